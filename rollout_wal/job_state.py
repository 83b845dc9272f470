"""What a job log adds up to: cohorts, and every rollout that is still of interest.

A pure state machine: the same code follows the log while it is written and rebuilds the state when it is read back.
Records that the state does not allow (a Finish of an attempt that was superseded, a second Finish) change nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LogCorruptInput, LogTooNew, problem
from .log.format import FLAG_IGNORABLE
from .records import (
    Attempt,
    Begin,
    Carried,
    Censor,
    Checkpoint,
    CheckpointEnd,
    Consumed,
    Delivered,
    Engine,
    Finish,
    Observe,
    Policy,
    Record,
    RecordType,
    Release,
    corrupt_record,
)
from .records import Cohort as CohortRecord


class Status(Enum):
    """Where a rollout stands."""

    IN_FLIGHT = "in flight"
    FINISHED = "finished"
    CENSORED = "censored"


@dataclass(slots=True)
class Rollout:
    """One rollout that the log has not released."""

    begin: Begin
    history: list[Attempt | Observe] = field(default_factory=list)
    """In the order of the log, which is what they mean: an Observe cuts what the engine had run past its position."""
    finish: Finish | None = None
    censor: Censor | None = None
    delivered: bool = False
    consumed: tuple[int, int] | None = None
    """(epoch, optimizer step)"""

    @property
    def id(self) -> int:
        return self.begin.rollout

    @property
    def status(self) -> Status:
        if self.finish is not None:
            return Status.FINISHED
        return Status.CENSORED if self.censor is not None else Status.IN_FLIGHT

    @property
    def attempts(self) -> list[Attempt]:
        return [h for h in self.history if isinstance(h, Attempt)]

    @property
    def observed(self) -> list[Observe]:
        return [h for h in self.history if isinstance(h, Observe)]

    @property
    def attempt(self) -> int:
        """The current attempt; 0 before the first."""
        return next((h.attempt for h in reversed(self.history) if isinstance(h, Attempt)), 0)

    @property
    def answered(self) -> bool:
        """Its output ends in observed tokens, and no engine has gone on from there yet."""
        return bool(self.history) and isinstance(self.history[-1], Observe)

    @property
    def interruptions(self) -> int:
        """Deaths that it survived."""
        return sum(a.cause == "resume" for a in self.attempts)

    def records(self) -> list[Record]:
        """The records that say all this again."""
        out: list[Record] = [self.begin, *self.history]
        out += [r for r in (self.finish, self.censor) if r is not None]
        if self.delivered:
            out.append(Delivered(_one(self.id)))
        if self.consumed is not None:
            out.append(Consumed(_one(self.id), *self.consumed))
        return out


@dataclass(slots=True)
class CohortState:
    """A cohort and what became of its members, the released ones included."""

    record: CohortRecord
    begun: int = 0
    delivered: int = 0
    """Finished ones handed over."""
    censored: Counter[str] = field(default_factory=Counter)
    """Handed over as censored, by reason."""
    consumed: int = 0
    released: int = 0
    released_members: set[int] = field(default_factory=set)
    """Indexes of released members, kept only until all are: then the count says it."""
    # Members by id, in the order they began: so that nobody who asks for a cohort's walks all that there are.
    members: dict[int, Rollout] = field(default_factory=dict)
    """Those that were not released."""
    unused: dict[int, Rollout] = field(default_factory=dict)
    """Of these, those that were not consumed: they come out, or come out again."""
    running: dict[int, Rollout] = field(default_factory=dict)
    """Of these, those that have not ended."""

    @property
    def used(self) -> int:
        """How many members do not come again: consumed or released."""
        return self.begun - len(self.unused)

    @property
    def in_flight(self) -> int:
        """Begun, and not yet handed over in either way."""
        return self.begun - self.delivered - sum(self.censored.values())

    @property
    def complete(self) -> bool:
        """Every member was begun, and used or let go."""
        return self.released == self.record.size


class JobState:
    """Apply the frames of a job log in order.

    What it holds of a rollout goes with its Release. Of a cohort its counts stay for ever: they are what makes a
    repeated call safe.
    """

    def __init__(self) -> None:
        self.rollouts: dict[int, Rollout] = {}
        self.in_flight: dict[int, Rollout] = {}
        """Of these, those that have not ended, in the order they began."""
        self.cohorts: dict[int, CohortState] = {}
        self._by_name: dict[str, CohortState] = {}
        self.engine: dict[str, Any] | None = None
        self.policy: Policy | None = None
        self.next_rollout = 1
        self._shadow: JobState | None = None
        self._carried = 0

    def cohort_named(self, name: str) -> CohortState | None:
        return self._by_name.get(name)

    @property
    def next_cohort(self) -> int:
        """The number of the next cohort: they are given in order, so the last is the highest."""
        return next(reversed(self.cohorts), 0) + 1

    def apply(self, frame_type: int, payload: bytes | memoryview, flags: int = 0) -> None:
        """Raises LogTooNew: a record of an unknown type that may not be skipped."""
        if frame_type == RecordType.CHECKPOINT:
            self._shadow = JobState()
            self._shadow._restore(Checkpoint.decode(payload).state)
        elif frame_type == RecordType.CARRIED:
            if self._shadow is not None:
                carried = Carried.decode(payload)
                self._shadow.change(_decoder(carried.type).decode(carried.payload))
                self._shadow._carried += 1
        elif frame_type == RecordType.CHECKPOINT_END:
            shadow, self._shadow = self._shadow, None
            end = CheckpointEnd.decode(payload)
            if shadow is not None:
                if shadow._carried != end.carried:
                    raise LogCorruptInput(
                        problem(
                            f"a checkpoint of {end.carried} records holds {shadow._carried}",
                            consequence="What the others said is unknown, so the log was not opened",
                            remedy="Report this with the log: its frames are intact, so the writer is at fault",
                        )
                    )
                self.rollouts, self.in_flight = shadow.rollouts, shadow.in_flight
                self.cohorts, self._by_name = shadow.cohorts, shadow._by_name
                self.engine, self.policy, self.next_rollout = shadow.engine, shadow.policy, shadow.next_rollout
        elif frame_type in _DECODERS or not flags & FLAG_IGNORABLE:
            self._shadow = None  # a checkpoint that a crash cut short: what it repeats is still in the segments before
            self.change(_decoder(frame_type).decode(payload))

    def change(self, record: Record) -> None:
        """One record's effect."""
        match record:
            case CohortRecord():
                if record.cohort not in self.cohorts:
                    self._add_cohort(CohortState(record))
            case Begin():
                self._begin(record)
            case Attempt():
                r = self.rollouts.get(record.rollout)
                if r and r.status is Status.IN_FLIGHT and record.attempt > r.attempt:
                    r.history.append(record)
            case Observe():
                if (r := self.rollouts.get(record.rollout)) and r.status is Status.IN_FLIGHT:
                    r.history.append(record)
            case Finish():
                r = self.rollouts.get(record.rollout)
                if r and r.status is Status.IN_FLIGHT and record.attempt == r.attempt:
                    r.finish = record
                    self._ended(r)
            case Censor():
                if (r := self.rollouts.get(record.rollout)) and r.status is Status.IN_FLIGHT:
                    r.censor = record
                    self._ended(r)
            case Delivered():
                self._delivered(record)
            case Consumed():
                self._consumed(record)
            case Release():
                self._release(record)
            case Policy():
                self.policy = record
            case Engine():
                self.engine = record.info
            case _:
                pass

    # -- effects ------------------------------------------------------------------------------------------------

    def _add_cohort(self, cohort: CohortState) -> None:
        self.cohorts[cohort.record.cohort] = cohort
        self._by_name.setdefault(cohort.record.name, cohort)

    def _begin(self, record: Begin) -> None:
        if record.rollout in self.rollouts:
            return
        r = Rollout(record)
        self.rollouts[r.id] = self.in_flight[r.id] = r
        self.next_rollout = max(self.next_rollout, r.id + 1)
        if cohort := self.cohorts.get(record.cohort):
            cohort.begun += 1
            cohort.members[r.id] = cohort.unused[r.id] = cohort.running[r.id] = r

    def _ended(self, r: Rollout) -> None:
        self.in_flight.pop(r.id, None)
        if cohort := self.cohorts.get(r.begin.cohort):
            cohort.running.pop(r.id, None)

    def _delivered(self, record: Delivered) -> None:
        for rollout in record.rollouts.tolist():
            r = self.rollouts.get(rollout)
            if r is None or r.delivered or r.status is Status.IN_FLIGHT:
                continue
            r.delivered = True
            if cohort := self.cohorts.get(r.begin.cohort):
                if r.censor is not None:
                    cohort.censored[r.censor.reason] += 1
                else:
                    cohort.delivered += 1

    def _consumed(self, record: Consumed) -> None:
        for rollout in record.rollouts.tolist():
            r = self.rollouts.get(rollout)
            if r is not None and r.consumed is None:
                r.consumed = (record.epoch, record.step)
                if cohort := self.cohorts.get(r.begin.cohort):
                    cohort.consumed += 1
                    cohort.unused.pop(r.id, None)

    def _release(self, record: Release) -> None:
        for rollout in record.rollouts.tolist():
            r = self.rollouts.pop(rollout, None)
            if r is None:
                continue
            self._ended(r)
            if cohort := self.cohorts.get(r.begin.cohort):
                cohort.members.pop(r.id, None)
                cohort.unused.pop(r.id, None)
                cohort.released += 1
                cohort.released_members.add(r.begin.index)
                if cohort.complete:
                    cohort.released_members.clear()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def checkpoint(self) -> list[Record]:
        """The records that repeat this state."""
        cohorts = []
        for c in self.cohorts.values():
            live = list(c.members.values())
            gone = Counter(r.censor.reason for r in live if r.delivered and r.censor is not None)
            cohorts.append(
                [
                    [c.record.cohort, c.record.name, c.record.digest, c.record.size],
                    # Only what the released members add: the live ones are counted again as they are repeated.
                    c.begun - len(live),
                    c.delivered - sum(r.delivered and r.finish is not None for r in live),
                    dict(c.censored - gone),
                    c.consumed - sum(r.consumed is not None for r in live),
                    c.released,
                    sorted(c.released_members),
                ]
            )
        state = {
            "cohorts": cohorts,
            "next_rollout": self.next_rollout,
            "engine": self.engine,
            "policy": [self.policy.version, self.policy.weights_digest, self.policy.source] if self.policy else None,
        }
        carried = [Carried(int(record.TYPE), record.encode()) for r in self.rollouts.values() for record in r.records()]
        return [Checkpoint(state), *carried, CheckpointEnd(len(carried))]

    def _restore(self, state: dict[str, Any]) -> None:
        """Raises LogCorruptInput: no state of a checkpoint."""
        try:
            for record, begun, delivered, censored, consumed, released, members in state["cohorts"]:
                self._add_cohort(
                    CohortState(
                        CohortRecord(*record), begun, delivered, Counter(censored), consumed, released, set(members)
                    )
                )
            self.next_rollout = state["next_rollout"]
            self.engine = state["engine"]
            self.policy = Policy(*state["policy"]) if state["policy"] is not None else None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise corrupt_record("Checkpoint", error) from error


_DECODERS: dict[int, type[Record]] = {
    int(cls.TYPE): cls
    for cls in (CohortRecord, Begin, Attempt, Observe, Finish, Censor, Delivered, Consumed, Release, Policy, Engine)
}


def _decoder(frame_type: int) -> type[Record]:
    decoder = _DECODERS.get(frame_type)
    if decoder is None:
        raise LogTooNew(
            problem(
                f"record type {frame_type} is unknown to this version and must not be skipped",
                consequence="The log was not opened",
                remedy="Upgrade rollout-wal to the version that wrote it, or a later one",
            )
        )
    return decoder


def _one(rollout: int) -> NDArray[np.int64]:
    return np.asarray([rollout], np.int64)
