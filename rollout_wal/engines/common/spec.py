"""What a client of a logging engine says about a rollout: flat keys beside its sampling parameters.

Flat, because what servers take along with a request are values that are text, numbers and lists of those.

    rollout            the rollout's id. Text: it names a rollout together with its prompt and parameters. A number
                       (below 2**62): as it is, for a front end that keeps a job log.
                       A request without an id is not logged.
    rollout_key        key of the noise, unsigned 64 bits. Default: made of the id and the request's seed.
    rollout_attempt    number of the attempt, where a front end counts them. Default: one more than is logged.
    rollout_prefix     so many tokens at the end of the prompt are output already: the front end resumes by itself.
                       Default: 0, and what is logged of the rollout comes first in the response.
    rollout_observed   which of these (indexes into the prefix) were observed, not sampled.
    rollout_release    ids whose rollouts nobody will ask for again; they are forgotten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...errors import problem
from ...params import SamplingParams

KEYS: Final = frozenset(
    {"rollout", "rollout_key", "rollout_attempt", "rollout_prefix", "rollout_observed", "rollout_release"}
)
_CONTENT_BITS: Final = 22


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """A request's rollout, as its client named it."""

    name: str | int
    key: int | None
    attempt: int | None
    prefix: int
    observed: tuple[int, ...]
    release: tuple[str | int, ...]


def spec_of(extra: Mapping[str, Any]) -> RolloutSpec | None:
    """What a request says, or None if it names no rollout. Checked by `check_spec` before."""
    if "rollout" not in extra:
        return None
    attempt, key = extra.get("rollout_attempt"), extra.get("rollout_key")
    return RolloutSpec(
        extra["rollout"],
        None if key is None else int(key),
        None if attempt is None else int(attempt),
        int(extra.get("rollout_prefix") or 0),
        tuple(extra.get("rollout_observed") or ()),
        tuple(extra.get("rollout_release") or ()),
    )


def check_spec(extra: Mapping[str, Any], *, own: Iterable[str] = ()) -> bool:
    """Whether a request names a rollout.

    Args:
        own: keys that the adapter itself adds.

    Raises:
        ValueError: unknown keys, or values out of range; names them.
    """
    ours = {k for k in extra if k == "rollout" or k.startswith("rollout_")} - set(own)
    if not ours:
        return False
    if unknown := sorted(ours - KEYS):
        raise ValueError(not_accepted(f"unknown rollout parameters {unknown}", f"Use {sorted(KEYS)}"))
    name = extra.get("rollout")
    if not _is_id(name):
        raise ValueError(not_accepted(f"rollout={name!r} is no id", "Pass non-empty text, or a number of 0..2**62-1"))
    for field, bits in (("rollout_key", 64), ("rollout_attempt", 31), ("rollout_prefix", 31)):
        value = extra.get(field)
        if value is not None and not _is_number(value, bits):
            raise ValueError(not_accepted(f"{field}={value!r} is out of range", f"Pass a number of 0..2**{bits}-1"))
    observed, release = extra.get("rollout_observed"), extra.get("rollout_release")
    if observed is not None and not (_is_list(observed) and all(_is_number(at, 31) for at in observed)):
        raise ValueError(
            not_accepted(f"rollout_observed={observed!r:.200} is no list of indexes", "Pass a list of numbers")
        )
    if release is not None and not (_is_list(release) and all(map(_is_id, release))):
        raise ValueError(
            not_accepted(
                f"rollout_release={release!r:.200} is no list of ids",
                "Pass a list; each id is non-empty text, or a number of 0..2**62-1",
            )
        )
    return True


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or _is_number(value, 62)


def _is_number(value: Any, bits: int) -> bool:
    # True equals 1: taken for a number, it would name somebody else's rollout.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def noise_key(spec: RolloutSpec, seed: int | None) -> int:
    """The rollout's noise: what its client says, or made of its id and seed."""
    if spec.key is not None:
        return spec.key
    return _digest(["noise", spec.name, seed])


def rollout_id(
    name: str | int,
    prompt: list[int],
    sampling: SamplingParams,
    key: int,
    more: Mapping[str, Any] | None = None,
) -> int:
    """The number under which the log keeps a rollout.

    A text alone would confuse two prompts that were sent under one name: the rest of the number tells them apart. Bit
    62 tells texts from numbers.

    Args:
        more: what else decides the tokens, plain types: an engine's own parameters. Most requests have nothing of it.
    """
    if isinstance(name, int):
        return name
    content = _digest([name, prompt, sampling.to_dict(), key, *([dict(more)] if more else [])]) % (1 << _CONTENT_BITS)
    return _name_bits(name) << _CONTENT_BITS | content


def named(rollouts: Iterable[int], names: Iterable[str | int]) -> list[int]:
    """Which of these numbers belong to any of the names."""
    numbers = {n for n in names if isinstance(n, int)}
    texts = {_name_bits(n) for n in names if isinstance(n, str)}
    return [r for r in rollouts if r in numbers or r >> _CONTENT_BITS in texts]


def _name_bits(name: str) -> int:
    return 1 << (62 - _CONTENT_BITS) | _digest(["name", name]) % (1 << (62 - _CONTENT_BITS))


def not_accepted(what: str, remedy: str) -> str:
    """What a client is told of a request that cannot be honoured."""
    return problem(what, consequence="The request was not accepted: nothing is sampled or logged", remedy=remedy)


def _digest(value: Any) -> int:
    text = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
