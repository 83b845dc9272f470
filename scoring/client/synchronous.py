"""The client for callers without an event loop: the same one, on the loop of a background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from rollout_wal.dataset import Provenance

from .asynchronous import AsyncScoringClient
from .background import background_loop
from .heads import TeacherHead
from .options import ClientOptions
from .run import Items, Outcome

_T = TypeVar("_T")


class ScoringClient:
    """Scores items on servers that have the same teachers. Use as a context manager, from any one thread at a time.

    Arguments as of `AsyncScoringClient`.
    """

    def __init__(
        self, targets: Sequence[str], options: ClientOptions | None = None, *, pins: dict[str, str] | None = None
    ) -> None:
        self._client = AsyncScoringClient(targets, options, pins=pins)
        self._loop = background_loop()

    @property
    def pins(self) -> dict[str, str]:
        """The checkpoint that is expected of each teacher that was named so far."""
        return self._client.pins

    def __enter__(self) -> ScoringClient:
        self._call(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._client.__aexit__())

    def teachers(self) -> dict[str, dict[str, Any]]:
        """As `AsyncScoringClient.teachers`."""
        return self._call(self._client.teachers())

    def head(self, teacher: str, expected: Provenance | None = None) -> TeacherHead:
        """As `AsyncScoringClient.head`."""
        return self._call(self._client.head(teacher, expected))

    def score(self, items: Items) -> Iterator[Outcome]:
        """As `AsyncScoringClient.score`. Closing the iterator drops what is not answered yet."""
        outcomes: Any = self._client.score(items)
        try:
            while True:
                try:
                    yield self._call(outcomes.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            self._call(outcomes.aclose())

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        ended = threading.Event()

        async def run() -> _T:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            # Interrupted here rather than failed there: what runs there must end before anything else is asked.
            if future.cancel():
                ended.wait(10.0)
            raise
