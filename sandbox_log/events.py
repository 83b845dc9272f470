"""What is logged, and how one event becomes bytes.

An event is a msgpack map with sorted keys. Each holds the digest of the event before it, so that the events of one
sandbox form a chain which cannot lose, gain or swap a link unseen:

    header ─▶ intent ─▶ outcome ─▶ intent ─▶ outcome ─▶ ...

Between them may stand `retry` (an intent in doubt is dispatched again, under a new exec id), `snapshot` (the state
was saved here) and `state` (how the state was had before going live). An intent is followed by its outcome before
the next intent: calls to one sandbox have one total order.

The kinds and the keys are on disk: never rename, only add.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgpack

from .errors import BadCall, LogDamaged, problem

#: The `prev` of the first event of a sandbox.
GENESIS = bytes(32)
FORMAT = 1


class Kind(StrEnum):
    """What an event is. The values are on disk."""

    HEADER = "header"
    INTENT = "intent"
    RETRY = "retry"
    OUTCOME = "outcome"
    SNAPSHOT = "snapshot"
    STATE = "state"


class End(StrEnum):
    """How a command ended. The values are on disk."""

    EXITED = "exited"
    """By itself; `exit_status` says how."""
    SIGNALLED = "signalled"
    """By a signal that was not ours: `signal` says which. The kernel's out-of-memory killer is one."""
    TIMED_OUT = "timed_out"
    """We killed its whole process tree at its timeout."""
    OUTPUT_LIMIT = "output_limit"
    """It wrote as much as it may. Everything that it wrote before is there."""
    NOT_STARTED = "not_started"
    """It could not be started, and no part of it ran. stderr says why."""
    TRANSPORT_LOST = "transport_lost"
    """Given up: whether and how far it ran is unknown. Only ever logged because a caller said so."""


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Bytes that lie in the blob store: `digest` is BLAKE2b-256 of the `size` uncompressed bytes."""

    digest: bytes
    size: int

    def to_map(self) -> dict[str, Any]:
        return {"blob": self.digest, "size": self.size}


#: Bytes that stand in the event itself, or a reference to them.
Payload = bytes | BlobRef


@dataclass(frozen=True, slots=True)
class Effect:
    """One change that a command made to the file system it can write to."""

    path: str
    """Relative to the sandbox's workspace; bytes that are not UTF-8 are escaped as by os.fsdecode."""
    change: str
    """"created", "modified" or "deleted"."""
    size: int = 0
    digest: bytes | None = None
    """BLAKE2b-256 of the content of a regular file; None for others and for files too large to hash."""


@dataclass(frozen=True, slots=True)
class Event:
    """One link of a sandbox's chain.

    Args:
        sequence: 0 for the header, then one more each.
        kind: what it is.
        epoch: of the writer that appended it; never falls along the chain.
        prev: digest of the previous event's bytes.
        time_ns: wall clock when it was appended, for people; nothing depends on it.
        body: the fields of its kind.
        digest: BLAKE2b-256 of this event's own bytes; derived, not stored in them.
    """

    sequence: int
    kind: Kind
    epoch: int
    prev: bytes
    time_ns: int
    body: Mapping[str, Any]
    digest: bytes = field(default=b"", compare=False)


def canonical(value: Any) -> bytes:
    """`value` as msgpack with the keys of every map sorted: equal values have equal bytes.

    Raises:
        BadCall: a value that msgpack cannot hold exactly, such as an object, an int beyond 64 bits, a string with a
            lone surrogate or lists within lists without end.
    """
    try:
        packed: bytes = msgpack.packb(_sorted(value), use_bin_type=True, strict_types=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise BadCall(
            problem(
                f"a value cannot be written to the log: {error}",
                consequence="Nothing was logged and nothing ran",
                remedy="Use text, bytes, 64-bit integers, floats, booleans, None, lists and maps with text keys",
            )
        ) from error
    return packed


_SCALARS = frozenset((str, bytes, int, float, bool, type(None)))


def _sorted(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise TypeError("a map has a key that is not text")
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    if isinstance(value, BlobRef):
        return value.to_map()
    return str(value) if isinstance(value, StrEnum) else value


def digest_of(data: bytes) -> bytes:
    """BLAKE2b-256, the one digest of this package."""
    return hashlib.blake2b(data, digest_size=32).digest()


def encode(event: Event) -> bytes:
    """The bytes of an event, which are also what its digest is over."""
    return canonical(
        {
            "seq": event.sequence,
            "kind": event.kind,
            "epoch": event.epoch,
            "prev": event.prev,
            "time_ns": event.time_ns,
            "body": event.body,
        }
    )


def decode(raw: bytes) -> Event:
    """The inverse of `encode`, with the digest filled in.

    Raises:
        LogDamaged: bytes that are no event.
    """
    try:
        fields = msgpack.unpackb(raw, raw=False, strict_map_key=True)
        return Event(
            sequence=fields["seq"],
            kind=Kind(fields["kind"]),
            epoch=fields["epoch"],
            prev=fields["prev"],
            time_ns=fields["time_ns"],
            body=fields["body"],
            digest=digest_of(raw),
        )
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise LogDamaged(
            problem(
                f"an event of {len(raw)} bytes cannot be decoded: {error!r}",
                consequence="The sandbox's history after it cannot be trusted",
                remedy="Run `rollout-wal sandbox verify` to see how far the chain holds; restore the log from a copy",
            )
        ) from error


def payload_to_plain(payload: Payload) -> Any:
    """As it stands in an event's body."""
    return payload.to_map() if isinstance(payload, BlobRef) else payload


def payload_from_plain(value: Any) -> Payload:
    """The inverse of `payload_to_plain`."""
    if isinstance(value, Mapping):
        return BlobRef(digest=value["blob"], size=value["size"])
    return bytes(value)


def blob_refs(value: Any) -> list[BlobRef]:
    """Every blob that an event's body refers to."""
    if isinstance(value, Mapping):
        if set(value) == {"blob", "size"} and isinstance(value["blob"], bytes):
            return [BlobRef(digest=value["blob"], size=value["size"])]
        return [ref for item in value.values() for ref in blob_refs(item)]
    if isinstance(value, list):
        return [ref for item in value for ref in blob_refs(item)]
    return []
