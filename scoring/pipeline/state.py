"""What a pipeline knows of rollouts on their way. Worked out again at every start; none of it is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rollout_wal.backend import FinishedRollout
from rollout_wal.dataset import ColumnGroup

from ..tasks import Task


@dataclass(slots=True, eq=False)
class Entry:
    """A rollout on its way."""

    batch: int
    rollout: FinishedRollout | None
    id: int
    key: str
    start_version: int | None
    length: int
    since_s: float
    tasks: list[Task] = field(default_factory=list)
    groups: dict[str, ColumnGroup] = field(default_factory=dict)
    open_tasks: int = 0
    covered: int = 0
    """Sampled tokens that some teacher scores."""


@dataclass(slots=True, eq=False)
class Batch:
    """A cohort on its way."""

    number: int
    size: int
    coming: int
    """Rollouts that the log has not handed out yet."""
    on_the_way: int = 0
    """Handed out, and neither scored nor dropped."""
    ready: list[Entry] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    uses: int = 0

    @property
    def complete(self) -> bool:
        return self.coming == 0 and self.on_the_way == 0


@dataclass(slots=True)
class PipelineStats:
    """Counts of rollouts, ages in seconds."""

    generating: int = 0
    finished: int = 0
    queued: int = 0
    scoring: int = 0
    scored: int = 0
    begun: int = 0
    sealed: int = 0
    consumed: int = 0
    stale: int = 0
    censored: int = 0
    unscorable: int = 0
    sampled_tokens: int = 0
    scored_tokens: int = 0
    held_back_s: float = 0.0
    """How long the engine was given no new prompts because there was no room behind it."""
    oldest_queued_s: float = 0.0
    """How long the oldest rollout has waited for scores."""
    oldest_scored_s: float = 0.0
    """How long the oldest one has waited for the learner."""

    @property
    def score_coverage(self) -> float | None:
        """Tokens with a score of those that were sampled and left scoring; None before there are any."""
        return self.scored_tokens / self.sampled_tokens if self.sampled_tokens else None
