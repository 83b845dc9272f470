"""How the log inside a server is set up: by environment variables, which reach each of SGLang's processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import BadInput, problem
from ...log.policy import SyncPolicy
from .plugin import LOG

_PREFIX: Final = "ROLLOUT_WAL_SGLANG_"
VERSION: Final = f"{_PREFIX}POLICY_VERSION"
KEEP: Final = f"{_PREFIX}KEEP"
SEGMENT_BYTES: Final = f"{_PREFIX}SEGMENT_BYTES"
GROUP_MS: Final = f"{_PREFIX}GROUP_MS"
TAKE_OVER: Final = f"{_PREFIX}TAKE_OVER"
_KNOWN: Final = frozenset({LOG, VERSION, KEEP, SEGMENT_BYTES, GROUP_MS, TAKE_OVER})


@dataclass(frozen=True, slots=True)
class Options:
    """What an operator may say about the log.

    Args:
        log: directory; each data-parallel rank has its own log in it, named by its number.
        policy_version: number of the weights that the server starts with.
        keep: how many rollouts that nobody runs stay in the log; see `StepLog`.
        segment_bytes: size of the log's files.
        sync: when the log is synced.
        take_over: fence a live owner of the log instead of waiting for it to end.
    """

    log: Path
    policy_version: int
    keep: int
    segment_bytes: int
    sync: SyncPolicy
    take_over: bool

    @classmethod
    def from_environment(cls) -> Options:
        """Raises BadInput: an unknown variable, one that is no number, or one out of range; names it."""
        if unknown := sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in _KNOWN):
            raise BadInput(
                problem(
                    f"unknown environment variables {unknown}",
                    consequence="SGLang was not started: the log would not be set up as was meant",
                    remedy=f"Unset them; known are {sorted(_KNOWN)}",
                )
            )
        group_ms = _number(GROUP_MS, 0, 0, 60_000)
        return cls(
            log=Path(os.environ[LOG]),
            policy_version=_number(VERSION, 0, 0, 10**18 - 1),
            keep=_number(KEEP, 10_000, 0, 10**9),
            segment_bytes=_number(SEGMENT_BYTES, 64 << 20, 1 << 16, 1 << 40),
            sync=SyncPolicy("group", group_ms=group_ms) if group_ms else SyncPolicy(),
            take_over=_number(TAKE_OVER, 0, 0, 1) == 1,
        )


def _number(variable: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(variable, "") or str(default)
    # isdecimal alone takes digits of other scripts too, and int() takes blanks and underscores.
    if text.isascii() and text.isdecimal() and least <= int(text) <= most:
        return int(text)
    raise BadInput(
        problem(
            f"{variable}={text!r} is not a number of {least}..{most}",
            consequence="SGLang was not started",
            remedy=f"Set it to digits, or leave it out: the default is {default}",
        )
    )
