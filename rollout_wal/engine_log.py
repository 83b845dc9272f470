"""The log that an engine process keeps: what it sampled, step by step."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .engine_state import EngineState, Key
from .errors import BadInput, problem
from .log.format import FLAG_IGNORABLE
from .log.log import ENGINE_LOG, Log
from .log.policy import SyncPolicy
from .log.segment import Frame
from .log.storage import Storage
from .records import Bind, Carry, Checkpoint, Engine, Forget, Policy, Record, RecordType, Snapshot
from .step import DTYPE_CODE, encode_step
from .stream import Stream

#: Retained bytes at which cleaning is worth its reading, in multiples of what is live.
_CLEAN_FACTOR: Final = 4
_STEP: Final = int(RecordType.STEP)  # an attribute of an enum costs on the hot path


class EngineLog:
    """One engine's log. `append_step` is the hot path; everything else happens per request or more rarely.

    `state` is what the log held when it was opened; it does not follow what is appended.
    """

    def __init__(self, log: Log, state: EngineState) -> None:
        self.log = log
        self.state = state
        self._live: dict[Key, tuple[int, int]] = {k: (s.start, s.slot) for k, s in state.streams.items()}
        self._slot_of: dict[int, Key] = {s.slot: k for k, s in state.streams.items() if s.slot >= 0}
        self._attempts: dict[int, list[int]] = {}
        for rollout, attempt in state.streams:
            self._attempts.setdefault(rollout, []).append(attempt)
        self._policy = state.policy
        self._engine = state.engine
        self._clean_above = 0
        self.held: deque[Frame] | None = None
        """Set to a deque: what is appended is kept in it, until `take_durable` hands it out."""
        self.wait_durable = log.wait_durable
        self.wait_durable_async = log.wait_durable_async
        self.sync_soon = log.sync_soon

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str] | Storage,
        *,
        segment_bytes: int = 64 << 20,
        policy: SyncPolicy | None = None,
        take_over: bool = False,
        prepare_ahead: bool = True,
        on_durable: Callable[[int], None] | None = None,
    ) -> EngineLog:
        """Own an engine's log and recover what is in it. Arguments and errors are those of `Log.open`."""
        state = EngineState()
        log = Log.open(
            where,
            kind=ENGINE_LOG,
            on_frame=state.apply,
            segment_bytes=segment_bytes,
            policy=policy,
            take_over=take_over,
            prepare_ahead=prepare_ahead,
            on_durable=on_durable,
        )
        return cls(log, state.finish())

    @property
    def durable_lsn(self) -> int:
        return self.log.durable_lsn

    def take_durable(self) -> list[Frame]:
        """The held frames that have become durable: what may now be shown, in order."""
        durable, held, out = self.log.durable_lsn, self.held, []
        while held and held[0].lsn <= durable:
            out.append(held.popleft())
        return out

    def _append(self, record: Record, flags: int = 0) -> int:
        return self._hand_over(int(record.TYPE), record.encode(), flags)

    def _hand_over(self, kind: int, payload: bytes, flags: int = 0) -> int:
        lsn = self.log.append(kind, payload, flags)
        if self.held is not None:
            self.held.append(Frame(kind, flags, lsn, 0, 0, memoryview(payload)))
        return lsn

    def engine(self, info: Mapping[str, Any]) -> int:
        """Say who produces the tokens from here on."""
        engine = dict(info)
        lsn = self._append(Engine(engine))
        self._engine = engine
        return lsn

    def policy(self, version: int, weights_digest: str, source: str = "") -> int:
        """Say under which weights the tokens are sampled from here on. Durable before any of them is shown."""
        policy = Policy(version, weights_digest, source)
        lsn = self._append(policy)
        self._policy = policy
        return lsn

    def bind(self, slot: int, rollout: int, attempt: int, start: int) -> int:
        """Rows of `slot` are of this attempt from the next step on.

        Raises:
            BadInput: a slot that a step cannot name, or what no record can hold; nothing was changed.
        """
        if not 0 <= slot < 1 << 16:
            raise BadInput(
                problem(
                    f"slot {slot} is out of range",
                    consequence="The attempt was not bound",
                    remedy="Use slots 0..65535; one engine log serves that many requests at a time",
                )
            )
        lsn = self._append(Bind(slot, rollout, attempt, start))
        previous = self._slot_of.pop(slot, None)
        if previous is not None and previous in self._live:
            self._live[previous] = (self._live[previous][0], -1)
        if (rollout, attempt) not in self._live:
            self._attempts.setdefault(rollout, []).append(attempt)
        self._live[rollout, attempt] = (start, slot)
        self._slot_of[slot] = (rollout, attempt)
        return lsn

    def append_step(
        self,
        slot_R: NDArray[np.uint16],
        token_N: NDArray[np.uint32],
        finish_R: NDArray[np.uint8],
        logprob_N: NDArray[np.float32] | None = None,
        sampling_logprob_N: NDArray[np.float32] | None = None,
        *,
        count_R: NDArray[np.uint16] | None = None,
        named: Mapping[int, NDArray[Any]] | None = None,
    ) -> int:
        """Log one engine step; see `step.encode_step`. Returns the LSN at once."""
        payload = encode_step(slot_R, token_N, finish_R, logprob_N, sampling_logprob_N, count_R=count_R, named=named)
        return self._hand_over(_STEP, payload)

    def snapshot(self, rollout: int, attempt: int, position: int, key: str) -> int:
        """Say that the KV of an attempt is durable up to a position. Never before it is."""
        return self._append(Snapshot(rollout, attempt, position, key), FLAG_IGNORABLE)

    def forget(self, rollouts: Iterable[int]) -> int:
        """Say that nobody needs the tokens of these rollouts from this log any longer."""
        gone = set(rollouts)
        lsn = self._append(Forget(np.fromiter(gone, np.int64, len(gone))))
        for rollout in gone:
            for attempt in self._attempts.pop(rollout, ()):
                _, slot = self._live.pop((rollout, attempt))
                if self._slot_of.get(slot) == (rollout, attempt):
                    del self._slot_of[slot]
        return lsn

    # -- cleaning -----------------------------------------------------------------------------------------------

    def clean(self, *, min_segments: int = 4) -> int:
        """Copy what is live into a new segment and unlink those before it. Returns how many were unlinked.

        Does nothing while fewer than `min_segments` are there, or while most of them is still live. Call it between
        steps. It costs one read of the old segments and one write of what is live in them; a log of long rollouts is
        looked at again only once it has grown to a multiple of what was live at the last look.
        """
        if len(self.log.segments()) < min_segments or self.log.retained_bytes() < self._clean_above:
            return 0
        self.wait_durable()
        state = EngineState()
        for frame in self.log.read():
            state.apply(frame)
        state.finish()
        checkpoint = self._checkpoint({k: s for k, s in state.streams.items() if k in self._live})
        # What they take, and no guess from the number of tokens: named columns may be most of it.
        self._clean_above = _CLEAN_FACTOR * sum(len(payload) for _, payload in checkpoint)
        if self.log.retained_bytes() < self._clean_above:
            return 0
        sequence = self.log.writer.rotate()
        for kind, payload in checkpoint:
            self._hand_over(kind, payload)
        self.wait_durable()
        return self.log.drop_before(sequence)

    def _checkpoint(self, live: Mapping[Key, Stream]) -> list[tuple[int, bytes]]:
        """Type and payload of the records that repeat what is live."""
        state = {
            "live": [[*key, start, slot] for key, (start, slot) in self._live.items()],
            "policy": (
                [self._policy.version, self._policy.weights_digest, self._policy.source] if self._policy else None
            ),
            "engine": self._engine,
        }
        records = [Checkpoint(state), *(self._carry(key, stream) for key, stream in live.items())]
        return [(int(record.TYPE), record.encode()) for record in records]

    def _carry(self, key: Key, stream: Stream) -> Carry:
        logprob, sampling = stream.logprob_T, stream.sampling_logprob_T
        return Carry(
            *key,
            stream.start,
            self._live[key][1],
            int(stream.finish),
            stream.token_T,
            # A column that is missing anywhere is carried as missing: never as a number that nobody logged.
            logprob.value_T if logprob.valid_T.all() else np.zeros(0, np.float32),
            sampling.value_T if sampling.valid_T.all() else np.zeros(0, np.float32),
            np.asarray(stream.version_at, np.int64),
            np.asarray(stream.versions, np.int64),
            {
                str(column_id): [
                    [first, DTYPE_CODE[c.dtype], c.shape[1] if c.ndim == 2 else 1, c.tobytes()] for first, c in entries
                ]
                for column_id, entries in stream.named.items()
            },
        )

    def close(self) -> None:
        self.log.close()
