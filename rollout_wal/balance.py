"""What a job says of itself in numbers: where each of its rollouts is, and how far its log has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobMark:
    """A place in a job's log."""

    job: str
    """Identity of the log, hex."""
    lsn: int
    """Everything up to it is durable."""


@dataclass(frozen=True, slots=True)
class CohortCount:
    """How much of a cohort there still is."""

    size: int
    gone: int
    """Consumed or released: they do not come again."""


@dataclass(frozen=True, slots=True)
class Balance:
    """The cohort balance (all cohorts together): begun = delivered + in_flight + sum(censored.values()). See I10."""

    begun: int
    delivered: int
    in_flight: int
    censored: Mapping[str, int]
    consumed: int
    released: int

    @property
    def holds(self) -> bool:
        """Every rollout is accounted for exactly once."""
        return self.begun == self.delivered + self.in_flight + sum(self.censored.values())

    def __str__(self) -> str:
        censored = ", ".join(f"{n} {reason}" for reason, n in sorted(self.censored.items())) or "0"
        return (
            f"begun {self.begun} = delivered {self.delivered} + in flight {self.in_flight} + censored {censored}"
            f"; consumed {self.consumed}, released {self.released}"
        )
