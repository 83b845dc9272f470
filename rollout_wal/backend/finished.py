"""What the consumer gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import FinishReason
from ..episode import Span
from ..tokens import Tokens


@dataclass(frozen=True, slots=True)
class FinishedRollout:
    """One delivered rollout: finished, or censored and saying why. Durable before it was handed over."""

    id: int
    key: str
    """cohort/index: the same after any number of restarts."""
    cohort: str
    index: int
    group: str
    prompt: NDArray[np.int32]
    output: Tokens
    finish_reason: FinishReason
    """RUNNING if censored."""
    censored: str | None
    seed: int
    interruptions: int
    """Deaths of a worker that it survived."""
    metadata: Mapping[str, Any]
    again: bool = False
    """It had been delivered before the last restart, and was not consumed."""
    episode: str = ""
    """The name by which the tools knew it; empty if it could call none."""
    turns: int = 0
    """Turns that were answered."""
    spans: tuple[Span, ...] = ()
    """Which output tokens are calls of tools or the final answer, as far as the parser can say."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Output tokens [T], without the prompt."""
        return self.output.token_T
