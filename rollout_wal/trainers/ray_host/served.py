"""What a host hands out: for each rollout of a cohort a future, which as many callers await as want it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from ...backend import FinishedRollout, RolloutBackend

Futures = dict[int, asyncio.Future[FinishedRollout]]


@dataclass(slots=True)
class _Cohort:
    """A cohort that this process of the actor hands out."""

    rollouts: Futures
    items: Iterator[FinishedRollout] | None = None
    """The one that is read. A later call takes the cohort over from it."""


class Served:
    """The cohorts that this process of the actor hands out. Used by its event loop only."""

    def __init__(self, backend: RolloutBackend) -> None:
        self._backend = backend
        self._cohorts: dict[str, _Cohort] = {}

    async def read(self, cohort: str, items: Iterator[FinishedRollout]) -> Futures:
        """Hand out `items`, the rollouts of a cohort as the backend finishes them.

        Returns:
            The futures of all members that are not gone, by index.
        """
        loop = asyncio.get_running_loop()
        members = await asyncio.to_thread(self._backend.members, cohort)
        entry = self._cohorts.setdefault(cohort, _Cohort({}))
        entry.items = items
        for index in members:
            entry.rollouts.setdefault(index, loop.create_future())
        threading.Thread(target=self._pump, args=(loop, entry, items), name=f"cohort {cohort}", daemon=True).start()
        return dict(entry.rollouts)

    async def futures(self, cohort: str) -> Futures:
        """Those of a cohort that has begun, in this process or in one before it."""
        if cohort not in self._cohorts:
            await self.read(cohort, await asyncio.to_thread(self._backend.again, cohort))
        return self._cohorts[cohort].rollouts

    async def forget_gone(self) -> None:
        """Let go of what was consumed or released."""
        for name, entry in list(self._cohorts.items()):
            left = await asyncio.to_thread(self._backend.members, name)
            entry.rollouts = {i: future for i, future in entry.rollouts.items() if i in left}
            if not entry.rollouts:
                del self._cohorts[name]

    def _pump(self, loop: asyncio.AbstractEventLoop, entry: _Cohort, items: Iterator[FinishedRollout]) -> None:
        """In a thread of its own: waiting for a rollout blocks."""
        try:
            for item in items:
                loop.call_soon_threadsafe(self._settle, entry, item)
        except Exception as error:
            loop.call_soon_threadsafe(self._fail, entry, items, error)

    def _settle(self, entry: _Cohort, item: FinishedRollout) -> None:
        future = entry.rollouts.get(item.index)
        if future is not None and not future.done():
            future.set_result(item)

    def _fail(self, entry: _Cohort, items: Iterator[FinishedRollout], error: Exception) -> None:
        if entry.items is not items:
            return  # a later call has taken the cohort over
        for future in entry.rollouts.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # it may be that nobody asks
