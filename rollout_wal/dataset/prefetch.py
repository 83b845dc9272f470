"""How many steps a node's reader stays ahead of its slowest rank: no more than the ranks need, for it is memory.

A rank that had to wait deepens it by one, at once; a long time without a wait makes it shallower by one. Waiting costs
a step of training and memory costs nothing until it is short, so the way up is quick and the way down slow.
"""

from __future__ import annotations

#: A wait shorter than this is the time that a message takes.
WAIT_S_MIN = 0.001
#: Takes without a wait after which one step less is read ahead.
CALM_TAKES = 64


class PrefetchDepth:
    """Steps to read ahead: `value`, between 1 and `steps_max`."""

    def __init__(self, steps_max: int) -> None:
        self._max = steps_max
        self._calm_takes = 0
        self.value = min(2, steps_max)

    def taken(self, waited_s: float) -> None:
        """A rank took a step, for which it had waited this long."""
        if waited_s > WAIT_S_MIN:
            self.value = min(self.value + 1, self._max)
            self._calm_takes = 0
            return
        self._calm_takes += 1
        if self._calm_takes >= CALM_TAKES:
            self.value = max(self.value - 1, 1)
            self._calm_takes = 0
