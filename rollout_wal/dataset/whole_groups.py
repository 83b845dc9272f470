"""Packing that never splits a group of samples (the samples of one prompt, in GRPO) across optimizer steps.

Best-fit decreasing on two levels: the largest group goes to the fullest step that has room for its total and, its
samples best-fit into that step's bins, for each of them. At the end each step's samples are spread over its bins as
evenly as they fit. Bins are filled without regard to teachers: a step holds whatever groups it holds.

This is a Python loop, of some ten microseconds per sample; packing without groups is vectorised.

Shape legend: N = samples, G = groups.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import DatasetError, problem
from .packing import least_loaded

#: Steps that a group is tried in before one more is begun.
_TRIES = 24


@dataclass(slots=True)
class _Step:
    """A step that is being filled. `free`: (residual, bin), sorted; `samples` and the `bins` they are in."""

    free: list[tuple[int, int]]
    samples: list[int] = field(default_factory=list)
    bins: list[int] = field(default_factory=list)

    def take(self, samples: list[int], lengths: list[int]) -> bool:
        """Put the samples of a group, longest first, into the bins that they fit best; False: not all of them fit."""
        free = self.free.copy()
        chosen = []
        for length in lengths:
            at = bisect_left(free, (length, -1))
            if at == len(free):
                return False
            residual, number = free.pop(at)
            insort(free, (residual - length, number))
            chosen.append(number)
        self.free = free
        self.samples += samples
        self.bins += chosen
        return True


def pack_groups(
    lengths_N: NDArray[np.int64], group_N: NDArray[np.int32], bins_per_step: int, capacity: int
) -> NDArray[np.int32]:
    """The bin of each sample, int32 [N]; bins are numbered step by step, `bins_per_step` each, some maybe empty.

    Groups of equal totals are taken in the order of their first samples, so a shuffle before decides who meets whom.

    Args:
        lengths_N: tokens of each sample, 1..capacity.
        group_N: the group of each.

    Raises:
        DatasetError: a group that does not fit into one step.
    """
    out = np.empty(len(lengths_N), dtype=np.int32)
    if not len(lengths_N):
        return out
    _, first_G, code_N = np.unique(group_N, return_index=True, return_inverse=True)
    total_G = np.bincount(code_N, weights=lengths_N).astype(np.int64)
    # Samples by group, the longest of a group first.
    ordered = np.lexsort((-lengths_N, code_N))
    edges = np.concatenate([[0], np.cumsum(np.bincount(code_N))]).tolist()
    room = bins_per_step * capacity
    empty = [(capacity, number) for number in range(bins_per_step)]
    smallest = int(total_G.min())
    steps: list[_Step] = []
    open_steps: list[tuple[int, int]] = []  # (residual total, step), sorted
    for group in np.lexsort((first_G, -total_G)).tolist():
        total = int(total_G[group])
        samples = ordered[edges[group] : edges[group + 1]]
        members, lengths = samples.tolist(), lengths_N[samples].tolist()
        start = bisect_left(open_steps, (total, -1))
        for at in range(start, min(start + _TRIES, len(open_steps))):
            residual, number = open_steps[at]
            if steps[number].take(members, lengths):
                del open_steps[at]
                break
        else:
            residual, number = room, len(steps)
            steps.append(_Step(empty.copy()))
            if not steps[-1].take(members, lengths):
                raise _too_large(len(members), total, bins_per_step, capacity)
        if residual - total >= smallest:
            insort(open_steps, (residual - total, number))
    for number, step in enumerate(steps):
        samples = np.array(step.samples)
        even = least_loaded(lengths_N[samples], bins_per_step, capacity)
        out[samples] = number * bins_per_step + (np.array(step.bins) if even is None else even)
    return out


def _too_large(samples: int, tokens: int, bins: int, capacity: int) -> DatasetError:
    return DatasetError(
        problem(
            f"a group of {samples} samples and {tokens} tokens does not fit into one step of {bins} rows of {capacity}",
            consequence="Nothing was planned",
            remedy="Raise token_budget or bins_per_rank, or plan without whole_groups",
        )
    )
