"""When to give a rollout up: one that kills its worker again and again at the same place.

A worker that dies takes many rollouts with it, and all of them look guilty. So the one that is given up must have died
alone: suspects run one at a time, in a worker of their own, until they get past the place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from ..job_state import Rollout
from .pool import WorkerHandle
from .waiting import Waiting


@dataclass(frozen=True, slots=True)
class PoisonRule:
    """After `deaths` interruptions in a row that each came within `tokens` of where the attempt had started, the last
    of them with nobody else in the worker, the rollout is censored as "poison". Progress beyond that resets the count.
    """

    deaths: int = 8
    tokens: int = 4

    def streak(self, rollout: Rollout, length: int) -> int:
        """How many of its latest attempts died without progress to speak of. `length`: output tokens known now.

        An attempt that ended in a tool call did not die, however short it was.
        """
        if rollout.answered:
            return 0
        attempts = rollout.attempts
        starts = [a.start for a in attempts] + [length]
        died = [a.cause == "resume" for a in attempts[1:]] + [True]
        streak = 0
        for (before, after), dead in reversed(list(zip(pairwise(starts), died))):
            if not dead or after - before >= self.tokens:
                break
            streak += 1
        return streak


class Verdict(Enum):
    FREE = "may run in company"
    SUSPECT = "runs alone next"
    POISON = "is given up"


class Quarantine:
    """Who is suspected, and who runs alone. What it knows is not logged: a new backend tries once more."""

    def __init__(self, rule: PoisonRule) -> None:
        self._rule = rule
        self.waiting = Waiting()
        """Suspects that wait for a worker of their own."""
        self._alone: dict[str, tuple[int, int]] = {}
        self._died_alone: set[int] = set()

    def judge(self, rollout: Rollout, length: int) -> Verdict:
        """What becomes of a rollout that is about to be run; `length` as in `PoisonRule.streak`."""
        streak = self._rule.streak(rollout, length)
        if streak >= self._rule.deaths and rollout.id in self._died_alone:
            return Verdict.POISON
        self._died_alone.discard(rollout.id)
        return Verdict.SUSPECT if streak >= max(1, self._rule.deaths - 1) else Verdict.FREE

    def enter(self, worker: WorkerHandle, rollout: int, attempt: int) -> None:
        """It has the worker to itself from here on."""
        self._alone[worker.name] = (rollout, attempt)

    def occupies(self, worker: WorkerHandle) -> bool:
        """Whether a suspect has this worker to itself still: it is neither over nor past the place."""
        suspect = self._alone.get(worker.name)
        if suspect is None:
            return False
        rollout, attempt = suspect
        if worker.running.get(rollout) == attempt:
            worker.mirror.finish()
            stream = worker.mirror.streams.get(suspect)
            if stream is None or stream.length < self._rule.tokens:
                return True
        del self._alone[worker.name]
        return False

    def over(self, rollout: int) -> None:
        """It has ended: nothing is held against it."""
        self.waiting.remove(rollout)
        self._died_alone.discard(rollout)

    def died(self, worker: WorkerHandle) -> None:
        """The worker is dead, and what ran in it is still listed."""
        if self.occupies(worker):
            self._died_alone.add(self._alone.pop(worker.name)[0])
