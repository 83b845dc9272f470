"""The order of prompts, as a function of the epoch.

TRL's `RepeatSampler` draws each epoch's order from one generator that goes on from epoch to epoch. A trainer that is
started again has a new generator, so it would go through the first epoch's order once more, whatever the epoch: it
would ask for other prompts than those whose rollouts are in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class ByEpoch(Sampler[int]):
    """A `RepeatSampler` that yields in each epoch what it yields in that epoch of a run without interruption.

    Args:
        sampler: of TRL.
        epoch: that is about to begin or go on, from 0.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self._sampler, self._epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        generator = getattr(self._sampler, "generator", None)
        if generator is not None and self._sampler.seed is not None:
            generator.manual_seed(self._sampler.seed)
            for _ in range(self._epoch()):
                torch.randperm(self._sampler.num_samples, generator=generator)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
