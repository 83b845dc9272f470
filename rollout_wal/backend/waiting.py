"""Rollouts that wait for something, in order. One that is given up leaves at once, wherever it stands."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class Waiting:
    """A queue of different ids: both ends, membership and removal at the same cost however long it is. A trainer that
    aborts all that waits would otherwise walk the queue once for each."""

    def __init__(self) -> None:
        self._ids: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, rollout: int) -> bool:
        return rollout in self._ids

    def append(self, rollout: int) -> None:
        """It runs after all that wait already."""
        self._ids[rollout] = None

    def prepend(self, rollouts: Iterable[int]) -> None:
        """They run before all that wait already, in this order."""
        for rollout in reversed(list(rollouts)):
            self._ids[rollout] = None
            self._ids.move_to_end(rollout, last=False)

    def pop(self) -> int:
        """The first."""
        return self._ids.popitem(last=False)[0]

    def remove(self, rollout: int) -> None:
        """It waits no longer, if it did."""
        self._ids.pop(rollout, None)
