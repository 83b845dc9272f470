"""From the frames of an engine log to the tokens of each attempt, vectorised.

Steps are columns over requests; rollouts want rows over time. Frames are gathered into batches, and a transpose (the
same requests in all steps) or one stable sort by slot turns a whole batch around. A slot that changes hands inside a
batch splits its run where it was bound anew.

Shape legend: S = steps of a batch, R = rows (requests) of a step, T = tokens of a run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import LogTooNew, problem
from .log.format import FLAG_IGNORABLE
from .log.segment import Frame
from .records import Bind, Carry, Checkpoint, Engine, Forget, Policy, RecordType, Snapshot, corrupt_record
from .step import DTYPES, Step, decode_step
from .stream import Stream, finish_of

_BATCH_TOKENS: Final = 1 << 18
"""Bounds the memory of a recovery beside what is in flight; larger is no faster."""

_HEADER: Final = struct.Struct("<IIBBH")
# The two shapes that engines write all day: one token per row, and one or both logprobs.
_ONE: Final = b"\x01\x00\x01\x00"
_BOTH: Final = _ONE + b"\x02\x00\x01\x00"
_COMMON: Final = (_ONE, _BOTH)
_U32, _U16, _F32 = np.dtype("<u4"), np.dtype("<u2"), np.dtype("<f4")

Key = tuple[int, int]
"""(rollout, attempt)"""


class EngineState:
    """What an engine log adds up to. Apply its frames in order, then `finish()`."""

    def __init__(self) -> None:
        self.streams: dict[Key, Stream] = {}
        self.engine: dict[str, Any] | None = None
        self.policy: Policy | None = None
        self.snapshots: dict[Key, Snapshot] = {}
        self.bound: dict[int, Stream] = {}
        self._attempts: dict[int, set[int]] = {}
        """Of each rollout that has streams: so that letting go of one does not walk all."""
        self._before_checkpoint: dict[Key, Stream] = {}
        self._columns = 0
        self._rows = 0
        self._clear_batch()

    # -- frames -------------------------------------------------------------------------------------------------

    def apply(self, frame: Frame) -> None:
        kind = frame.type
        if kind == RecordType.STEP:
            self._step(frame.payload)
        elif kind == RecordType.BIND:
            self._bind(Bind.decode(frame.payload))
        else:
            self._rare(kind, frame)

    def finish(self) -> EngineState:
        """Flush what is still batched. Call it after the last frame, and before looking."""
        self._flush()
        return self

    def _rare(self, kind: int, frame: Frame) -> None:
        if kind == RecordType.FORGET:
            self.forget(Forget.decode(frame.payload).rollouts.tolist())
        elif kind == RecordType.SNAPSHOT:
            snapshot = Snapshot.decode(frame.payload)
            self.snapshots[snapshot.rollout, snapshot.attempt] = snapshot
        elif kind == RecordType.ENGINE:
            self.engine = Engine.decode(frame.payload).info
        elif kind == RecordType.POLICY:
            self._flush()  # what was sampled so far is of the version before
            self.policy = Policy.decode(frame.payload)
        elif kind == RecordType.CHECKPOINT:
            self._flush()
            self._checkpoint(Checkpoint.decode(frame.payload).state)
        elif kind == RecordType.CARRY:
            self._flush()
            self._carry(Carry.decode(frame.payload))
        elif kind != RecordType.COLUMN and not frame.flags & FLAG_IGNORABLE:
            raise LogTooNew(
                problem(
                    f"record type {kind} at LSN {frame.lsn} is unknown to this version and must not be skipped",
                    consequence="The log was not opened",
                    remedy="Upgrade rollout-wal to the version that wrote it, or a later one",
                )
            )

    def _bind(self, bind: Bind) -> None:
        stream = self.streams.get((bind.rollout, bind.attempt))
        if stream is None:
            stream = Stream(bind.rollout, bind.attempt, bind.start, bind.slot)
            self.streams[bind.rollout, bind.attempt] = stream
            self._attempts.setdefault(bind.rollout, set()).add(bind.attempt)
        previous = self.bound.get(bind.slot)
        if previous is not None and previous is not stream:
            previous.slot = -1
        stream.slot = bind.slot
        self._rebinds.setdefault(bind.slot, []).append((self._rows, stream))
        self.bound[bind.slot] = stream

    def forget(self, rollouts: Iterable[int]) -> None:
        """Drop all attempts of these rollouts."""
        for rollout in rollouts:
            for attempt in self._attempts.pop(rollout, ()):
                self._drop((rollout, attempt))

    def forget_attempt(self, key: Key) -> None:
        """Drop one attempt."""
        if (attempts := self._attempts.get(key[0])) is not None and key[1] in attempts:
            attempts.remove(key[1])
            if not attempts:
                del self._attempts[key[0]]
            self._drop(key)

    def _drop(self, key: Key) -> None:
        stream = self.streams.pop(key)
        self.snapshots.pop(key, None)
        if self.bound.get(stream.slot) is stream:
            # Rows of the slot are nobody's from here on; those before, in this batch, go down with the stream.
            del self.bound[stream.slot]
            self._rebinds.setdefault(stream.slot, []).append((self._rows, None))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _checkpoint(self, state: dict[str, Any]) -> None:
        """What precedes this record may be gone; bindings and version must be known from here on."""
        try:
            live = {(rollout, attempt): (start, slot) for rollout, attempt, start, slot in state["live"]}
            policy = Policy(*state["policy"]) if state.get("policy") is not None else None
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt_record("Checkpoint", error) from error
        self._before_checkpoint = {k: s for k, s in self.streams.items() if k in live}
        self.streams = {key: Stream(*key, start, slot) for key, (start, slot) in live.items()}
        self._attempts = {}
        for rollout, attempt in self.streams:
            self._attempts.setdefault(rollout, set()).add(attempt)
        self.bound = {s.slot: s for s in self.streams.values() if s.slot >= 0}
        # Until its Carry has been read, a stream keeps what the older segments said, if they are still there.
        for key, earlier in self._before_checkpoint.items():
            self.streams[key].prepend(earlier)
        self.policy = policy or self.policy
        if state.get("engine") is not None:
            self.engine = state["engine"]
        self._clear_batch()

    def _carry(self, carry: Carry) -> None:
        key = (carry.rollout, carry.attempt)
        stream = self.streams.get(key)
        if stream is None or key in self._before_checkpoint:
            return  # forgotten since, or known from the older segments, which say the same
        earlier = Stream(carry.rollout, carry.attempt, carry.start)
        length = len(carry.tokens)
        edges = [*carry.version_at.tolist(), length]
        if (
            len(carry.version_at) != len(carry.versions)
            or edges != sorted(edges)
            or (length and edges[0] != 0)
            or any(len(column) not in (0, length) for column in (carry.logprobs, carry.sampling_logprobs))
        ):
            raise corrupt_record("Carry", ValueError("its columns do not agree"))
        for index, version in enumerate(carry.versions.tolist()):
            at = slice(edges[index], edges[index + 1])
            earlier.extend(
                carry.tokens[at],
                carry.logprobs[at] if len(carry.logprobs) else None,
                carry.sampling_logprobs[at] if len(carry.sampling_logprobs) else None,
                version,
            )
        for name, chunks in carry.named.items():
            for first, code, width, data in chunks:
                column = np.frombuffer(data, DTYPES[code])
                earlier.named.setdefault(int(name), []).append(
                    (first, column.reshape(-1, width) if width > 1 else column)
                )
        earlier.finish = finish_of(carry.finish)
        stream.prepend(earlier)

    # -- steps --------------------------------------------------------------------------------------------------

    def _step(self, payload: memoryview) -> None:
        """Steps of the common kind wait as they are: an array for each column of each step would cost too much."""
        if len(payload) >= _HEADER.size:
            rows, tokens, n_columns, flags, _ = _HEADER.unpack_from(payload)
            at = 12 + 4 * n_columns
            if (
                flags == 0
                and rows == tokens
                and 0 < n_columns <= 2
                and payload[12:at] == _COMMON[n_columns - 1]
                and at + (4 * n_columns + 7) * rows == len(payload)
            ):
                if n_columns != self._columns:
                    self._flush()
                    self._columns = n_columns
                self._steps.append(payload)
                self._rows += rows
                if self._rows >= _BATCH_TOKENS:
                    self._flush()
                return
        self._other_step(decode_step(payload))

    def _other_step(self, step: Step) -> None:
        """Several tokens per row, named or missing columns: turned around one by one."""
        self._flush()
        slot, finish = step.slot_R, step.finish_R
        if step.count_R is not None:  # one row per token; the finish flag belongs to the row's last
            ends = np.cumsum(step.count_R, dtype=np.int64) - 1
            spread = np.zeros(len(step.token_N), np.uint8)
            has_tokens = step.count_R > 0
            spread[ends[has_tokens]] = finish[has_tokens]
            slot, finish = np.repeat(slot, step.count_R), spread
        before = {name: stream.length for name in set(slot.tolist()) if (stream := self.bound.get(name)) is not None}
        self._turn(_Columns(slot, step.token_N, finish, step.logprob_N, step.sampling_logprob_N))
        for name, length in before.items():
            rows = slot == name
            for column_id, column in step.named.items():
                self.bound[name].named.setdefault(column_id, []).append((length, column[rows]))
        self._clear_batch()

    # -- batches ------------------------------------------------------------------------------------------------

    def _clear_batch(self) -> None:
        self._columns = 0
        self._rows = 0
        self._steps: list[memoryview] = []
        self._rebinds: dict[int, list[tuple[int, Stream | None]]] = {}
        self._bound_at_start: dict[int, Stream] = dict(self.bound)

    def _flush(self) -> None:
        """Turn the batch around: from steps of slots to runs of tokens."""
        if self._rows:
            runs = [_matrix(list(run), self._columns) for _, run in groupby(self._steps, len)]
            if len(runs) == 1 and (runs[0].slot == runs[0].slot[0]).all() and _distinct(runs[0].slot[0]):
                self._transpose(runs[0])
            else:
                self._turn(_Columns.joined(runs))
        if self._rows or self._rebinds:
            self._clear_batch()

    def _transpose(self, columns: _Columns) -> None:
        """The same slots in the same order in all steps S: a transpose turns them around, without a sort."""
        version = self._version
        token_RS, finish_RS = np.ascontiguousarray(columns.token.T), np.ascontiguousarray(columns.finish.T)
        logprob_RS = np.ascontiguousarray(columns.logprob.T) if columns.logprob is not None else None
        sampling_RS = np.ascontiguousarray(columns.sampling.T) if columns.sampling is not None else None
        steps, width = columns.slot.shape
        for row, slot in enumerate(columns.slot[0].tolist()):
            splits = [(at // width, stream) for at, stream in self._rebinds.get(slot, ())]
            for stream, a, b in _pieces(self._bound_at_start.get(slot), splits, 0, steps):
                stream.extend(
                    token_RS[row, a:b].copy(),
                    logprob_RS[row, a:b].copy() if logprob_RS is not None else None,
                    sampling_RS[row, a:b].copy() if sampling_RS is not None else None,
                    version,
                    last_finish(finish_RS[row, a:b]),
                )

    def _turn(self, columns: _Columns) -> None:
        """Any steps at all: one stable sort by slot."""
        version = self._version
        slot = columns.slot
        order = np.argsort(slot, kind="stable")  # a radix sort, for 16 bits
        token, finish = columns.token[order], columns.finish[order]
        logprob = columns.logprob[order] if columns.logprob is not None else None
        sampling = columns.sampling[order] if columns.sampling is not None else None
        count = np.bincount(slot)
        ends = np.cumsum(count)
        for name in np.flatnonzero(count).tolist():
            end = int(ends[name])
            begin = end - int(count[name])
            splits = [
                (begin + int(np.searchsorted(order[begin:end], at)), stream)
                for at, stream in self._rebinds.get(name, ())
            ]
            for stream, a, b in _pieces(self._bound_at_start.get(name), splits, begin, end):
                # Copies: a view would keep the whole batch alive for one rollout that is still in flight.
                stream.extend(
                    token[a:b].copy(),
                    logprob[a:b].copy() if logprob is not None else None,
                    sampling[a:b].copy() if sampling is not None else None,
                    version,
                    last_finish(finish[a:b]),
                )

    @property
    def _version(self) -> int:
        return self.policy.version if self.policy is not None else 0


@dataclass(frozen=True, slots=True)
class _Columns:
    """Steps as columns: [rows], or [steps, rows of each]."""

    slot: NDArray[np.uint16]
    token: NDArray[np.uint32]
    finish: NDArray[np.uint8]
    logprob: NDArray[np.float32] | None
    sampling: NDArray[np.float32] | None

    @classmethod
    def joined(cls, runs: list[_Columns]) -> _Columns:
        def join(columns: list[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate([column.reshape(-1) for column in columns])

        return cls(
            join([r.slot for r in runs]),
            join([r.token for r in runs]),
            join([r.finish for r in runs]),
            join([r.logprob for r in runs if r.logprob is not None]) if runs[0].logprob is not None else None,
            join([r.sampling for r in runs if r.sampling is not None]) if runs[0].sampling is not None else None,
        )


def _matrix(steps: list[memoryview], n_columns: int) -> _Columns:
    """Steps of the common kind and of one length, as views of one buffer: [steps, rows]."""
    length = len(steps[0])
    at = 12 + 4 * n_columns
    rows = (length - at) // (4 * n_columns + 7)
    data = np.frombuffer(b"".join(steps), np.uint8).reshape(len(steps), length)

    def column(index: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        start = at + 4 * rows * index
        return data[:, start : start + dtype.itemsize * rows].view(dtype)

    return _Columns(
        column(n_columns + 1, _U16),
        column(0, _U32),
        data[:, length - rows :],
        column(1, _F32),
        column(2, _F32) if n_columns == 2 else None,
    )


def _distinct(slot_R: NDArray[np.uint16]) -> bool:
    return len(np.unique(slot_R)) == len(slot_R)


def _pieces(
    stream: Stream | None, splits: list[tuple[int, Stream | None]], begin: int, end: int
) -> Iterator[tuple[Stream, int, int]]:
    """Whose rows the run [begin, end) of a slot are, in order. Rows of an unbound slot are nobody's."""
    for split, successor in splits:
        if stream is not None and split > begin:
            yield stream, begin, split
        begin, stream = max(begin, split), successor
    if stream is not None and end > begin:
        yield stream, begin, end


def last_finish(finish_T: NDArray[np.uint8]) -> int:
    """The finish flag of a run of tokens: its last, or an earlier one if the engine ran on after it."""
    if flag := int(finish_T[-1]):
        return flag
    flagged = np.flatnonzero(finish_T)
    return int(finish_T[flagged[-1]]) if len(flagged) else 0
