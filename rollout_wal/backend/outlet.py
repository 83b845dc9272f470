"""Where the finished rollouts of one cohort come out: the coordinator puts, one consumer takes."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator

from .finished import FinishedRollout
from .progress import Progress

Item = FinishedRollout | BaseException | None
"""None: all have come out."""


class Outlet:
    """The coordinator's end. All but `put` of it is for the coordinator's thread.

    Args:
        put: hands an item to the consumer; called on the coordinator's thread, and must not block.
    """

    def __init__(self, put: Callable[[Item], None]) -> None:
        self._put = put
        self.cohort: int | None = None
        """Whose rollouts come out here; None before that is known."""
        self.wanted: set[int] = set()
        """Rollouts not handed over yet."""
        self.expected = 0
        """How many come out in all."""
        self.closed = False
        """Nobody takes any more."""

    def put(self, item: Item) -> None:
        # An event loop that was closed takes nothing more. Its rollouts count as delivered and not consumed.
        with contextlib.suppress(RuntimeError):
            self._put(item)


class Drain(Iterator[FinishedRollout]):
    """The consumer's end: an iterator over what comes out. Closing or dropping it aborts nothing, iterated or not.

    Args:
        items: what the outlet puts.
        detach: has the outlet closed; called once, on whatever thread, the garbage collector's included.
        shown: a progress bar, which begins with the first item that is asked for.
    """

    def __init__(
        self, items: queue.SimpleQueue[Item], detach: Callable[[], object], shown: Progress | None = None
    ) -> None:
        self._items = items
        self._detach: Callable[[], object] | None = detach
        self._shown = shown
        self._showing = False

    def __next__(self) -> FinishedRollout:
        if self._detach is None:
            raise StopIteration
        try:
            item = self._next()
        except BaseException:
            self.close()
            raise
        if isinstance(item, FinishedRollout):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def _next(self) -> Item:
        if self._shown is None:
            return self._items.get()
        if not self._showing:
            self._shown.__enter__()
            self._showing = True
        while True:
            try:
                item = self._items.get(timeout=0.25)
            except queue.Empty:
                self._shown.refresh()
                continue
            if isinstance(item, FinishedRollout):
                self._shown.advance()
            return item

    def close(self) -> None:
        """Take nothing more. The rollouts go on, and come out of a later call of the same name."""
        detach, self._detach = self._detach, None
        if detach is not None:
            detach()
        if self._shown is not None and self._showing:
            self._showing = False
            self._shown.__exit__()

    def __del__(self) -> None:
        if getattr(self, "_detach", None) is not None:
            self.close()
