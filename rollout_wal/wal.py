"""RolloutWal: rollouts on top of the logs.

    PATH/job/             the job log: what the front end decides
    PATH/engines/NAME/    one engine log per worker: what the engine saw

`RolloutWal` owns the job log. Engine logs belong to the engine processes; it opens one only when its process is dead
(`absorb`), or when the engine runs in this process (`engine_log`).

Every method that changes something appends a record and returns its LSN at once. Nothing may depend on it before
`wait_durable(lsn)`.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .balance import Balance, CohortCount, JobMark
from .engine_log import EngineLog
from .engine_logs import engine_names, engine_path, io_errors_named, open_engine_log
from .engine_state import Key
from .engines.base import EngineInfo, FinishReason
from .errors import BadInput, CohortMismatch, UnknownRollout, problem
from .job_state import CohortState, JobState, Rollout, Status
from .log.log import JOB_LOG, Log
from .log.policy import SyncPolicy
from .log.segment import Frame
from .params import SamplingParams
from .prompts import check_prompt
from .provenance import check_engine, check_follows, engine_record
from .records import (
    Attempt,
    Begin,
    Censor,
    Cohort,
    Consumed,
    Delivered,
    Engine,
    Finish,
    Observe,
    Policy,
    Record,
    Release,
)
from .stream import Stream
from .tokens import Tokens, assemble

__all__ = ["Balance", "CohortCount", "JobMark", "RolloutWal", "open_engine_log"]

_CLEAN_SEGMENTS: Final = 4
_CLEAN_FACTOR: Final = 2


class RolloutWal:
    """See the module. Not thread-safe but for `wait_durable` and its twin: one thread drives it."""

    def __init__(self, path: Path, log: Log, state: JobState, segment_bytes: int, policy: SyncPolicy) -> None:
        self.path = path
        self.log = log
        self.state = state
        self.info: EngineInfo | None = None
        self.streams: dict[Key, Stream] = {}
        """Tokens known so far, by (rollout, attempt): from `absorb`, or as engines report them durable."""
        self.segment_bytes = segment_bytes
        self.policy = policy
        self._clean_above = 0
        self.wait_durable = log.wait_durable
        self.wait_durable_async = log.wait_durable_async

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        segment_bytes: int = 64 << 20,
        policy: SyncPolicy | None = None,
        take_over: bool = False,
    ) -> RolloutWal:
        """Own a job, creating it if it is not there. Every engine log is absorbed; its processes must be dead.

        Args:
            segment_bytes: size of the files a log consists of.
            policy: when appends are synced.
            take_over: fence a live owner.

        Raises:
            LogOwned, LogDamaged, LogTooNew: see `log.log.Log.open`. LogPoisoned: the disk is full or broken.
        """
        root = Path(path)
        state = JobState()

        def on_frame(frame: Frame) -> None:
            state.apply(frame.type, frame.payload, frame.flags)

        sync = policy or SyncPolicy()
        with io_errors_named(root / "job"):
            log = Log.open(
                root / "job",
                kind=JOB_LOG,
                on_frame=on_frame,
                segment_bytes=segment_bytes,
                policy=sync,
                take_over=take_over,
            )
        wal = cls(root, log, state, segment_bytes, sync)
        try:
            for name in wal.engine_names():
                wal.absorb(name, take_over=take_over)
        except BaseException:
            log.close()
            raise
        return wal

    # -- engines ------------------------------------------------------------------------------------------------

    def engine_path(self, name: str) -> Path:
        """Where the engine log of this name lives. Raises BadInput: not a plain name."""
        return engine_path(self.path, name)

    def engine_names(self) -> list[str]:
        return engine_names(self.path)

    def engine_log(self, name: str = "0", **options: Any) -> EngineLog:
        """The engine log of an engine in this process. It is yours to close. Options are those of EngineLog.open."""
        options.setdefault("segment_bytes", self.segment_bytes)
        options.setdefault("policy", self.policy)
        return EngineLog.open(self.engine_path(name), **options)

    def absorb(self, name: str, *, take_over: bool = False) -> None:
        """Read what a dead engine's log holds of rollouts that are still of interest, and let the rest go.

        Args:
            take_over: fence its process at once, instead of giving it time to end.

        Raises:
            LogFenced: this job has another owner by now, to whom the engine logs belong too. LogDamaged: see
                `log.recovery`. LogPoisoned: the disk is full or broken.
        """
        path = self.engine_path(name)
        check_owner = self.log.fence.check
        check_owner()
        with io_errors_named(path):
            log = open_engine_log(path, self.segment_bytes, self.policy, take_over=take_over, check_owner=check_owner)
            self._absorb(log)

    def _absorb(self, log: EngineLog) -> None:
        try:
            # Once more, now that the engine log is ours: a new owner claims the job before any engine log. If nobody
            # has by now, nothing that was read is of rollouts which this process has not heard of, and would forget.
            self.log.fence.check()
            wanted = self.state.rollouts
            for key, stream in log.state.streams.items():
                if key[0] in wanted:
                    self.streams[key] = stream
            if gone := {key[0] for key in log.state.streams if key[0] not in wanted}:
                log.forget(gone)
                log.wait_durable()
            log.clean()
        finally:
            log.close()

    def declare_engine(self, info: EngineInfo) -> None:
        """Say which engine samples. Logged when it differs from the logged one in ways that are allowed to differ.

        Raises:
            ArchitectureMismatch, TokenizerMismatch: the log holds rollouts of another model.
            UndeclaredWeights: these are not the weights of the logged policy version.
        """
        check_engine(info, self.state.engine, self.state.policy)
        if self.state.engine != (record := engine_record(info)):
            self._append(Engine(record))
        self.info = info

    def declare_policy(self, version: int, weights_digest: str, source: str = "") -> int:
        """Log a policy version. Durable before any token of it may be sampled.

        Raises:
            BadInput: the version does not follow the logged one.
        """
        current = self.state.policy
        if current is not None and (version, weights_digest) == (current.version, current.weights_digest):
            return self.log.writer.last_lsn
        check_follows(version, current)
        return self._append(Policy(version, weights_digest, source))

    # -- rollouts -----------------------------------------------------------------------------------------------

    def begin_cohort(self, name: str, digest: str, size: int) -> CohortState:
        """The cohort of this name: the logged one, or a new one.

        Raises:
            CohortMismatch: it was logged with other contents.
        """
        known = self.state.cohort_named(name)
        if known is None:
            number = self.state.next_cohort
            self._append(Cohort(number, name, digest, size))
            return self.state.cohorts[number]
        if (known.record.digest, known.record.size) != (digest, size):
            raise CohortMismatch(
                problem(
                    f"cohort {name!r} is in the log with {known.record.size} rollouts and digest "
                    f"{known.record.digest}; this call has {size} and {digest}",
                    consequence="Nothing was begun",
                    remedy="Pass the same prompts, sampling parameters, group size and seed, or another cohort name",
                )
            )
        return known

    def begin(
        self,
        prompt: ArrayLike,
        sampling: SamplingParams,
        *,
        seed: int,
        noise: str = "position",
        cohort: CohortState | None = None,
        index: int = 0,
        group: str = "",
        metadata: Mapping[str, Any] | None = None,
        turns: Mapping[str, Any] | None = None,
    ) -> int:
        """A new rollout. Returns its id; durable (`wait_durable`) before its first token may be asked for.

        Args:
            prompt: token ids [T], T >= 1.
            seed: unsigned 64-bit; with the position it determines all noise.
            noise: "position" or "attempt", see `records.Begin`.
            metadata: msgpack-able.
            turns: how its turns end, if it may call tools; see `records.Begin`.

        Raises:
            BadPrompt: empty, ids out of the vocabulary, or longer than the context. Needs `declare_engine`
                to know the last two.
        """
        tokens = check_prompt(prompt, self.info)
        rollout = self.state.next_rollout
        number = cohort.record.cohort if cohort is not None else 0
        self._append(
            Begin(
                rollout,
                tokens,
                sampling.to_dict(),
                operator.index(seed) & 0xFFFFFFFFFFFFFFFF,
                noise,
                number,
                index,
                group,
                dict(metadata or {}),
                dict(turns or {}),
            )
        )
        return rollout

    def attempt(self, rollout: int, log: str, cause: str = "start") -> Attempt:
        """A new attempt at a rollout, from where its tokens end. Durable before the engine is told."""
        r = self._in_flight(rollout)
        record = Attempt(rollout, r.attempt + 1, len(self.tokens(rollout)), log, cause)
        self._append(record)
        return record

    def observe(self, rollout: int, tokens: ArrayLike, *, position: int | None = None) -> int:
        """Append tokens that the policy did not sample (loss mask 0) behind its first `position` output tokens.

        Args:
            position: default: behind all that is known. What an engine ran past it is void.

        Raises:
            BadInput: the logs hold fewer tokens.
        """
        self._in_flight(rollout)
        known = len(self.tokens(rollout))
        if position is not None and not 0 <= position <= known:
            raise BadInput(
                problem(
                    f"tokens observed by rollout {rollout} would stand behind {position} tokens; it has {known}",
                    consequence="Nothing was logged",
                    remedy="Observe at a position up to which the tokens are durable",
                )
            )
        return self._append(Observe(rollout, known if position is None else position, np.asarray(tokens, np.int32)))

    def finish(self, rollout: int, reason: FinishReason, *, count: int | None = None) -> int:
        """A rollout is complete with its first `count` output tokens (default: all). Delivery waits for it."""
        r = self._in_flight(rollout)
        length = len(self.tokens(rollout)) if count is None else count
        return self._append(Finish(rollout, r.attempt, length, int(reason)))

    def censor(self, rollout: int, reason: str, *, count: int | None = None) -> int:
        """A rollout ends without having finished: deadline, abort, poison, out of memory, in doubt, ...

        Args:
            count: output tokens that it keeps; default: all.
        """
        self._in_flight(rollout)
        return self._append(Censor(rollout, reason, len(self.tokens(rollout)) if count is None else count))

    def abort(self, rollout: int) -> int:
        """The caller gives a rollout up. It is delivered as censored."""
        return self.censor(rollout, "abort")

    def delivered(self, rollouts: Iterable[int]) -> int:
        """They were handed to the consumer."""
        return self._append(Delivered(self._known(rollouts)))

    def consumed(self, rollouts: Iterable[int], *, epoch: int, step: int) -> int:
        """Optimizer step `step` used them. Once durable they are never delivered again.

        Raises:
            UnknownRollout, BadInput: one of them is not there, or was not delivered; nothing was logged.
        """
        return self._append(Consumed(self._handed_over(rollouts, "Consuming"), epoch, step))

    def release(self, rollouts: Iterable[int]) -> int:
        """Their tokens need not be kept: they were consumed, or are safe elsewhere.

        Raises:
            UnknownRollout, BadInput: one of them is not there, or was not delivered; nothing was logged.
        """
        ids = self._handed_over(rollouts, "Releasing")
        keys = [key for rollout in ids.tolist() for key in self.keys(rollout)]
        lsn = self._append(Release(ids))
        for key in keys:
            self.streams.pop(key, None)
        return lsn

    # -- what is known ------------------------------------------------------------------------------------------

    def rollout(self, rollout: int) -> Rollout:
        """Raises UnknownRollout."""
        r = self.state.rollouts.get(rollout)
        if r is None:
            raise UnknownRollout(
                problem(
                    f"rollout {rollout} is not in the log {self.path}",
                    consequence="Nothing was changed",
                    remedy="It was never begun here, or has been released; `rollout-wal inspect` lists those there are",
                )
            )
        return r

    def tokens(self, rollout: int) -> Tokens:
        """All output tokens known of a rollout; of a finished one, those that count."""
        r = self.rollout(rollout)
        tokens = assemble(r, lambda rid, attempt: self.streams.get((rid, attempt)))
        end = r.finish or r.censor
        return tokens[: end.count] if end is not None else tokens

    def keys(self, rollout: int) -> list[Key]:
        """(rollout, attempt) of each of its attempts."""
        return [(rollout, a.attempt) for a in self.rollout(rollout).attempts]

    def in_flight(self) -> list[Rollout]:
        """Begun, and neither finished nor censored."""
        return list(self.state.in_flight.values())

    def undelivered(self) -> list[Rollout]:
        """Finished or censored and not consumed: to be delivered, or delivered again after a restart."""
        return [r for r in self.state.rollouts.values() if r.status is not Status.IN_FLIGHT and r.consumed is None]

    def balance(self) -> Balance:
        """Where every rollout of every cohort is."""
        cohorts = self.state.cohorts.values()
        return Balance(
            begun=sum(c.begun for c in cohorts),
            delivered=sum(c.delivered for c in cohorts),
            # Counted from the table, not as what is missing: the sum is then a check and not a definition.
            in_flight=sum(
                not r.delivered and r.begin.cohort in self.state.cohorts for r in self.state.rollouts.values()
            ),
            censored=sum((c.censored for c in cohorts), Counter()),
            consumed=sum(c.consumed for c in cohorts),
            released=sum(c.released for c in cohorts),
        )

    # -- upkeep -------------------------------------------------------------------------------------------------

    def cohorts(self) -> dict[str, CohortCount]:
        """Every cohort by name, those included that are wholly used."""
        return {c.record.name: _count(c) for c in self.state.cohorts.values()}

    def cohorts_in_flight(self) -> dict[str, CohortCount]:
        """Those of which something is in flight. Costs what that is, whatever the job has had."""
        numbers = {r.begin.cohort for r in self.state.in_flight.values()}
        return {c.record.name: _count(c) for c in map(self.state.cohorts.__getitem__, numbers)}

    def cohort(self, name: str) -> CohortCount | None:
        """One of them, or None if the log has none of this name."""
        found = self.state.cohort_named(name)
        return None if found is None else _count(found)

    def clean(self) -> int:
        """Repeat what is live in a new segment and unlink the older ones, when it is worth it.

        Most of it live: it is not looked at again before the log has grown to a multiple of that. Looking costs as
        much as what is live, and this is called at each release.
        """
        if len(self.log.segments()) < _CLEAN_SEGMENTS or self.log.retained_bytes() < self._clean_above:
            return 0
        records = [(int(record.TYPE), record.encode()) for record in self.state.checkpoint()]
        self._clean_above = _CLEAN_FACTOR * sum(len(payload) for _, payload in records)
        if self.log.retained_bytes() < self._clean_above:
            return 0
        sequence = self.log.writer.rotate()
        for kind, payload in records:
            self.log.append(kind, payload)
        self.wait_durable()
        return self.log.drop_before(sequence)

    def close(self) -> None:
        self.log.close()

    def __enter__(self) -> RolloutWal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _append(self, record: Record) -> int:
        lsn = self.log.append(record.TYPE, record.encode())
        self.state.change(record)
        return lsn

    def _in_flight(self, rollout: int) -> Rollout:
        r = self.rollout(rollout)
        if r.status is not Status.IN_FLIGHT:
            raise BadInput(
                problem(
                    f"rollout {rollout} is already {r.status.value}",
                    consequence="Nothing was changed",
                    remedy="Only a rollout in flight can go on or end",
                )
            )
        return r

    def _handed_over(self, rollouts: Iterable[int], doing: str) -> NDArray[np.int64]:
        ids = self._known(rollouts)
        for rollout in ids.tolist():
            r = self.state.rollouts[rollout]
            if not r.delivered:
                raise BadInput(
                    problem(
                        f"rollout {rollout} is {r.status.value} and was not delivered",
                        consequence=f"{doing} it would lose it silently, so nothing was changed",
                        remedy="Take it from its cohort's iterator first; to give it up, abort it",
                    )
                )
        return ids

    def _known(self, rollouts: Iterable[int]) -> NDArray[np.int64]:
        ids = list(rollouts)
        for rollout in ids:
            self.rollout(rollout)
        return np.asarray(ids, np.int64)


def _count(cohort: CohortState) -> CohortCount:
    return CohortCount(cohort.record.size, cohort.used)
