"""Counts of values by upper bound: what Prometheus calls a histogram, in plain numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

#: Of a sync, in seconds: from a battery-backed cache to a disk that is about to fail.
SYNC_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram:
    """Written by one thread and read by any."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """One for each bound, and one for what is above all of them."""
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many are not above it), the last one for all."""
        out, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), tuple(self.counts)):
            below += count
            out.append((bound, float(below)))
        return out
