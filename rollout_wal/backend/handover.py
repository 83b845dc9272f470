"""Where finished rollouts leave: each cohort's members to whoever listens there, once, and durable before (I1).

A rollout that nobody listens for waits in the table. Handed over and not consumed, it comes again to the next who
listens (I10): what was handed over may have died with whoever took it.
"""

from __future__ import annotations

from ..engines.base import FinishReason
from ..errors import BackendError, problem
from ..job_state import Status
from ..wal import RolloutWal
from .finished import FinishedRollout
from .outlet import Outlet
from .stats import Stats
from .turns import Turns


class Handover:
    """See the module. For the coordinator's thread."""

    def __init__(self, wal: RolloutWal, turns: Turns | None, stats: Stats) -> None:
        self._wal = wal
        self._turns = turns
        self._stats = stats
        self._outlets: dict[int, Outlet] = {}

    def attach(self, cohort: int, outlet: Outlet) -> None:
        """Have the rollouts of a cohort come out here: first those that were ready and not consumed."""
        if outlet.closed:  # whoever asked has gone while this waited for its turn
            return
        if (earlier := self._outlets.get(cohort)) is not None:
            earlier.closed = True
            earlier.put(
                BackendError(
                    problem(
                        f"cohort {self._wal.state.cohorts[cohort].record.name!r} was asked for again by a later call",
                        consequence="This iterator ends here; what it had not yet handed over comes out there",
                        remedy="Iterate over a cohort in one place at a time",
                    )
                )
            )
        self._outlets[cohort] = outlet
        outlet.cohort = cohort
        members = list(self._wal.state.cohorts[cohort].unused.values())
        outlet.wanted = {r.id for r in members}
        outlet.expected = len(members)
        for r in members:
            # One that tools still hold comes out when they have let go.
            if r.status is not Status.IN_FLIGHT and not (self._turns is not None and self._turns.releasing(r.id)):
                self.deliver(r.id)
        if not members:
            outlet.put(None)

    def detach(self, outlet: Outlet) -> None:
        """Nobody listens there any more. The rollouts go on."""
        outlet.closed = True
        if outlet.cohort is not None and self._outlets.get(outlet.cohort) is outlet:
            del self._outlets[outlet.cohort]

    def __len__(self) -> int:
        """How many outlets there are."""
        return len(self._outlets)

    def fail(self, error: BaseException) -> None:
        """Nothing more comes out: tell everybody who listens."""
        for outlet in self._outlets.values():
            outlet.put(error)

    def deliver(self, rollout: int) -> None:
        """Hand a rollout over. Whatever justifies it is durable, and this owner was not fenced after the sync."""
        r = self._wal.state.rollouts[rollout]
        outlet = self._outlets.get(r.begin.cohort)
        if outlet is None or rollout not in outlet.wanted:
            return  # it waits in the table until somebody attaches
        cohort = self._wal.state.cohorts[r.begin.cohort].record
        tokens = self._wal.tokens(rollout)
        # The sync looked at the fence too, but that may be long ago: a new owner hands out what it finds (I5).
        self._wal.log.fence.check()
        again = r.delivered
        if not again:
            self._wal.delivered([rollout])
            self._stats.finished += 1
        outlet.wanted.discard(rollout)
        outlet.put(
            FinishedRollout(
                id=rollout,
                key=f"{cohort.name}/{r.begin.index}",
                cohort=cohort.name,
                index=r.begin.index,
                group=r.begin.group,
                prompt=r.begin.prompt,
                output=tokens,
                finish_reason=FinishReason(r.finish.reason) if r.finish else FinishReason.RUNNING,
                censored=r.censor.reason if r.censor else None,
                seed=r.begin.seed,
                interruptions=r.interruptions,
                metadata=r.begin.metadata,
                again=again,
                episode=self._turns.episode(rollout) if self._turns is not None and r.begin.turns else "",
                turns=len(r.observed),
                spans=self._turns.spans(r, tokens) if self._turns is not None else (),
            )
        )
        if not outlet.wanted:
            outlet.put(None)
