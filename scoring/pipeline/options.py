"""What goes into a pipeline, and how much of it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from ..errors import BadConfiguration, problem


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """The prompts of one batch: a closed cohort, which the learner gets as a whole.

    Args:
        prompts: token ids, one sequence each.
        metadata: one mapping per prompt; "domain" becomes the sample's domain.
    """

    prompts: Sequence[ArrayLike]
    metadata: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Bounds in rollouts, and rules.

    A stage whose successor has no room waits, and so on back to the engine, which is given no new prompts. The oldest
    batch is always let through, for the learner may be waiting for the last of it: each bound may be exceeded by one
    batch.

    Args:
        name: of the cohorts in the log: another name is another sequence of batches.
        group_size: rollouts of each prompt.
        seed: determines every rollout's seed.
        generation: rollouts that were begun, and not yet sealed into the dataset.
        scoring: sealed ones that wait for scores, or are being scored.
        scored: scored ones that wait for the learner.
        max_lag: a rollout whose first token was sampled under a version older than the current one minus this is
            dropped (None: never). By the first token, because a cut by the last would remove long rollouts.
        replay: how often the learner gets each batch.
        censored: train on rollouts that did not end, too.
        seal_s, commit_s: how long finished rollouts, or scores, may wait for others to share a commit.
    """

    name: str = "pipeline"
    group_size: int = 1
    seed: int = 0
    generation: int = 256
    scoring: int = 256
    scored: int = 512
    max_lag: int | None = None
    replay: int = 1
    censored: bool = False
    seal_s: float = 1.0
    commit_s: float = 1.0

    def __post_init__(self) -> None:
        if min(self.group_size, self.generation, self.scoring, self.scored, self.replay) < 1 or (self.max_lag or 0) < 0:
            raise BadConfiguration(
                problem(
                    f"{self!r} is no pipeline",
                    consequence="Nothing was started",
                    remedy="Bounds, group_size and replay are at least 1, max_lag at least 0",
                )
            )
