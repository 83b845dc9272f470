"""The engine logs of a job, PATH/engines/NAME/: where they are, and how the job's owner opens them.

They belong to the engine processes. The owner opens one only when its process is dead, or when the engine runs in this
process; and only ever as the owner of the job, to whom the engine logs belong too (I5).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from .engine_log import EngineLog
from .errors import BadInput, LogOwned, LogPoisoned, problem
from .log.policy import SyncPolicy

_ENGINE_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
#: How long an engine may take to end after its backend is dead, before it is fenced: it notices between two steps.
_ORPHAN_S: Final = 5.0


def engine_path(job: Path, name: str) -> Path:
    """Where the engine log of this name lives. Names come from outside, and never become paths unasked (I9).

    Raises:
        BadInput: not a plain name.
    """
    if not _ENGINE_NAME.match(name):
        raise BadInput(
            problem(
                f"engine name {name!r} is not a plain name",
                consequence="It would become a file path, so no log was opened",
                remedy="Use letters, digits, '.', '_' and '-', at most 64 of them",
            )
        )
    return job / "engines" / name


def engine_names(job: Path) -> list[str]:
    """Those that there are."""
    engines = job / "engines"
    return sorted(p.name for p in engines.iterdir() if p.is_dir()) if engines.is_dir() else []


def open_engine_log(
    path: Path,
    segment_bytes: int,
    policy: SyncPolicy,
    *,
    take_over: bool = False,
    patience_s: float = _ORPHAN_S,
    check_owner: Callable[[], None] = lambda: None,
) -> EngineLog:
    """Own an engine log. For the owner of its job alone: whatever else holds it is left over from a dead backend.

    Such an engine ends by itself within a step; one that has not when the patience is over hangs, and is fenced.

    Args:
        check_owner: raises LogFenced if the job has another owner by now; whoever holds the log may be its engine.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return EngineLog.open(path, segment_bytes=segment_bytes, policy=policy, take_over=take_over)
        except LogOwned:
            time.sleep(0.01)
            check_owner()
            take_over = time.monotonic() > deadline


@contextlib.contextmanager
def io_errors_named(path: Path) -> Iterator[None]:
    """An I/O error while a log is opened, as one that says what to do."""
    try:
        yield
    except OSError as error:
        raise LogPoisoned(
            problem(
                f"the log {path} cannot be opened: {error}",
                consequence="Nothing was changed, and everything acknowledged is still in it",
                remedy="Cure the disk (space, quota, permissions, device), then start again",
            )
        ) from error
