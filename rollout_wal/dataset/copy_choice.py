"""Which of two ways to copy is faster on this machine, found out while copying.

Processors and kernels disagree by a factor of two, in either direction, so neither is the right default. Both give the
same bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Final

#: Copies by which a way is judged. The first of them maps files and warms caches: a median does not mind.
_WINDOW: Final = 9
#: Then the other way gets one copy of so many, in case the machine has changed its mind.
_SECOND_LOOK: Final = 64


class CopyChoice:
    """Judges by the median rate of the last copies of each way.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._rates: tuple[deque[float], deque[float]] = (deque(maxlen=_WINDOW), deque(maxlen=_WINDOW))
        self._best = 0
        self._count = 0

    def copy(self, size: int, first: Callable[[], None], second: Callable[[], bool]) -> None:
        """Copy `size` bytes: `first`, or `second`, which says whether it could; `first` copies what it could not."""
        way = self._next()
        began = self._clock()
        if way == 0:
            first()
            copied = True
        else:
            copied = second()
        took = self._clock() - began
        self._rates[way].append(size / max(took, 1e-9) if copied else 0.0)
        one, other = self._rates
        if len(one) == len(other) == _WINDOW:
            self._best = int(median(other) > median(one))
        if not copied:
            first()

    def _next(self) -> int:
        self._count += 1
        if len(self._rates[0]) < _WINDOW or len(self._rates[1]) < _WINDOW:
            return self._count % 2
        return 1 - self._best if self._count % _SECOND_LOOK == 0 else self._best
