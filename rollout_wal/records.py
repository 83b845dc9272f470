"""What is logged. Each record says one thing that happened; the state of everything is what they add up to.

The *job log*, owned by the backend, holds what a front end decides: cohorts, Begin, Attempt, Observe, Finish, Censor,
Delivered, Consumed, Release. An *engine log*, one per worker rank and owned by the engine process, holds what the
engine saw: Bind, Step, Snapshot, Forget. Engine, Policy and the checkpoints occur in both.

A record is a msgpack array of its fields in order. A newer writer may add fields at the end, which an older reader
ignores; a field that an older writer did not know takes its default. Steps alone are columns, see `step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar, Final, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from .errors import BadInput, LogCorruptInput, problem


class RecordType(IntEnum):
    """The numbers are on disk: never renumber, only add."""

    BEGIN = 1
    ATTEMPT = 2
    STEP = 3
    OBSERVE = 4
    POLICY = 5
    SNAPSHOT = 6
    FINISH = 7
    CENSOR = 8
    DELIVERED = 9
    CONSUMED = 10
    RELEASE = 11
    CHECKPOINT = 12
    COHORT = 13
    ENGINE = 14
    BIND = 15
    FORGET = 16
    CARRY = 17
    COLUMN = 18
    CARRIED = 19
    CHECKPOINT_END = 20


@dataclass(frozen=True, slots=True)
class Record:
    """Base of all records but Step. Arrays are one-dimensional and travel as little-endian bytes."""

    TYPE: ClassVar[RecordType]
    ARRAYS: ClassVar[Mapping[str, str]] = {}
    """Array fields and their dtypes on disk."""

    def encode(self) -> bytes:
        """Raises BadInput: a value that `decode` would refuse. Once logged, it would keep the log from being opened."""
        arrays = self.ARRAYS
        try:
            _check_types(self)
            _check_depths(self)
            values = []
            for f in fields(self):
                value = getattr(self, f.name)
                if f.name in arrays:
                    value = np.ascontiguousarray(value, dtype=arrays[f.name]).tobytes()
                values.append(value)
            packed: bytes = msgpack.packb(values)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _unfit(type(self).__name__, error) from error
        return packed

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Raises LogCorruptInput: not such a record."""
        try:
            # msgpack's own bounds are the length of the payload: a hostile length allocates no more than that.
            values = msgpack.unpackb(payload, strict_map_key=False)
            if not isinstance(values, list):
                raise TypeError(f"{type(values).__name__} instead of an array")
            known = fields(cls)
            raw = {f.name: value for f, value in zip(known, values)}
            for name, dtype in cls.ARRAYS.items():
                if name in raw:
                    raw[name] = np.frombuffer(raw[name], dtype)
            record = cls(**raw)
            _check_types(record)
            return record
        except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
            raise corrupt_record(cls.__name__, error) from error


_DEEPEST: Final = 100
_NESTED: Final = (dict, list, tuple)
_PLAIN: Final = {"int": int, "str": str, "bytes": bytes, "dict[str, Any]": dict}
_TYPED: Final[dict[str, list[tuple[str, type]]]] = {}


def _typed_fields(record: Record) -> list[tuple[str, type]]:
    name = type(record).__name__
    if name not in _TYPED:
        _TYPED[name] = [(f.name, _PLAIN[str(f.type)]) for f in fields(record) if str(f.type) in _PLAIN]
    return _TYPED[name]


def _check_types(record: Record) -> None:
    """A number where a name should be would go unnoticed until something depended on it."""
    for name, kind in _typed_fields(record):
        found = type(getattr(record, name))
        # A member of an enum is packed as the number or the name that it is; True comes back as no number.
        if found is not kind and (found is bool or not issubclass(found, kind)):
            raise TypeError(f"{name} is {found.__name__} instead of {kind.__name__}")


def _check_depths(record: Record) -> None:
    for name, kind in _typed_fields(record):
        if kind is dict:
            check_depth(getattr(record, name))


def check_depth(value: Mapping[str, Any]) -> None:
    """Raises ValueError: nested too deeply. msgpack packs a little more than it unpacks, and how much depends on its
    build and on the caller's stack; this bound is far below all of them."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, _NESTED)]
        if not level:
            return
    raise ValueError(f"lists and mappings are nested more than {_DEEPEST} deep")


def _members(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def _unfit(name: str, error: Exception) -> BadInput:
    return BadInput(
        problem(
            f"a {name} record cannot be logged: {error}",
            consequence="Nothing was logged",
            remedy="Pass plain values of the types that are asked for: int(...) for numbers, str(...) for names",
        )
    )


def corrupt_record(name: str, error: Exception) -> LogCorruptInput:
    """A record whose frame is intact and whose contents are not what they claim to be."""
    return LogCorruptInput(
        problem(
            f"a {name} record cannot be decoded: {type(error).__name__}: {error}",
            consequence="What it says is unknown",
            remedy="Report this with the log: the frame around it is intact, so the writer is at fault",
        )
    )


@dataclass(frozen=True, slots=True)
class Cohort(Record):
    """A closed set of rollouts, named before the first of them begins."""

    TYPE: ClassVar = RecordType.COHORT
    cohort: int
    name: str
    digest: str
    """Over prompts, sampling parameters and seeds: the same name with other contents is refused."""
    size: int


@dataclass(frozen=True, slots=True)
class Begin(Record):
    """A rollout exists. Durable before its first token is asked for."""

    TYPE: ClassVar = RecordType.BEGIN
    ARRAYS: ClassVar = {"prompt": "<i4"}
    rollout: int
    prompt: NDArray[np.int32]
    sampling: dict[str, Any]
    seed: int
    noise: str = "position"
    """'position': keyed by (seed, position). 'attempt': drawn afresh at each resume, keyed by attempt too."""
    cohort: int = 0
    index: int = 0
    """Position within the cohort."""
    group: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    turns: dict[str, Any] = field(default_factory=dict)
    """How its turns end and who reads its tool calls (`episode.Episodes.record`). Empty: it calls no tools."""


@dataclass(frozen=True, slots=True)
class Attempt(Record):
    """One engine is about to go on with a rollout. Durable before the engine is told."""

    TYPE: ClassVar = RecordType.ATTEMPT
    rollout: int
    attempt: int
    start: int
    """Output tokens (sampled and observed) that precede it. What an earlier attempt logged beyond is void."""
    log: str
    """Name of the engine log that its tokens go to."""
    cause: str = "start"
    """start | resume (after a death) | turn (after observed tokens)"""


@dataclass(frozen=True, slots=True)
class Observe(Record):
    """Tokens that the policy did not sample: tool output. Loss mask 0. What an attempt logged beyond is void."""

    TYPE: ClassVar = RecordType.OBSERVE
    ARRAYS: ClassVar = {"tokens": "<i4"}
    rollout: int
    position: int
    """Output tokens that precede them."""
    tokens: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Policy(Record):
    """From here on, tokens are of these weights."""

    TYPE: ClassVar = RecordType.POLICY
    version: int
    weights_digest: str
    source: str = ""
    """Where a resume finds them: a folder."""


@dataclass(frozen=True, slots=True)
class Snapshot(Record):
    """The KV of a rollout up to a position is durable elsewhere."""

    TYPE: ClassVar = RecordType.SNAPSHOT
    rollout: int
    attempt: int
    position: int
    key: str


@dataclass(frozen=True, slots=True)
class Finish(Record):
    """A rollout is complete. The one record that delivery follows."""

    TYPE: ClassVar = RecordType.FINISH
    rollout: int
    attempt: int
    count: int
    """Output tokens that count; a stop string may cut what the engine had logged."""
    reason: int


@dataclass(frozen=True, slots=True)
class Censor(Record):
    """A rollout ends without having finished, and says why. It is delivered as censored, never dropped."""

    TYPE: ClassVar = RecordType.CENSOR
    rollout: int
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Delivered(Record):
    """Handed to the consumer, at least once."""

    TYPE: ClassVar = RecordType.DELIVERED
    ARRAYS: ClassVar = {"rollouts": "<i8"}
    rollouts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Consumed(Record):
    """An optimizer step has used them. They are never delivered again."""

    TYPE: ClassVar = RecordType.CONSUMED
    ARRAYS: ClassVar = {"rollouts": "<i8"}
    rollouts: NDArray[np.int64]
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Release(Record):
    """The log need not keep their tokens any longer."""

    TYPE: ClassVar = RecordType.RELEASE
    ARRAYS: ClassVar = {"rollouts": "<i8"}
    rollouts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Engine(Record):
    """Who produces the tokens from here on."""

    TYPE: ClassVar = RecordType.ENGINE
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bind(Record):
    """In an engine log: rows of this slot belong to this attempt from here on."""

    TYPE: ClassVar = RecordType.BIND
    slot: int
    rollout: int
    attempt: int
    start: int


@dataclass(frozen=True, slots=True)
class Forget(Record):
    """In an engine log: these rollouts were released or moved elsewhere; their tokens here are not needed."""

    TYPE: ClassVar = RecordType.FORGET
    ARRAYS: ClassVar = {"rollouts": "<i8"}
    rollouts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Carry(Record):
    """In an engine log's checkpoint: all that the log so far says of one attempt."""

    TYPE: ClassVar = RecordType.CARRY
    ARRAYS: ClassVar = {
        "tokens": "<u4",
        "logprobs": "<f4",
        "sampling_logprobs": "<f4",
        "version_at": "<i8",
        "versions": "<i8",
    }
    rollout: int
    attempt: int
    start: int
    slot: int
    """-1: not bound any more."""
    finish: int
    tokens: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    """Empty where the engine logged none (never a sentinel)."""
    sampling_logprobs: NDArray[np.float32]
    version_at: NDArray[np.int64]
    versions: NDArray[np.int64]
    """Policy versions as runs: from token version_at[i] on, versions[i]."""
    named: dict[str, Any] = field(default_factory=dict)
    """Named columns: id (in decimal) to a list of [first token, dtype code, width, bytes]."""


@dataclass(frozen=True, slots=True)
class Checkpoint(Record):
    """The state so far starts to be repeated here.

    In a job log, Carried records follow and a CheckpointEnd closes it; until that is read, the checkpoint says nothing.
    In an engine log, steps may come between it and its Carry records; those give what preceded the checkpoint.
    """

    TYPE: ClassVar = RecordType.CHECKPOINT
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Carried(Record):
    """In a job log's checkpoint: a record that is still needed, once more."""

    TYPE: ClassVar = RecordType.CARRIED
    type: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class CheckpointEnd(Record):
    """The checkpoint is whole: the state is what it says, and nothing before it."""

    TYPE: ClassVar = RecordType.CHECKPOINT_END
    carried: int
