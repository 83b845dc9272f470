"""Coroutines that wait for an LSN, each on its own event loop; they are woken from whatever thread leads the commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


class Awaiters:
    """Not thread-safe: the writer's mutex is held around every call."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[int]]] = []

    def add(self, lsn: int, loop: asyncio.AbstractEventLoop) -> asyncio.Future[int]:
        future: asyncio.Future[int] = loop.create_future()
        self._waiting.append((lsn, loop, future))
        return future

    def settle(self, durable: int) -> None:
        """Tell everybody whose LSN is durable."""
        if not self._waiting:
            return
        for lsn, loop, future in self._waiting:
            if lsn <= durable:
                _tell(loop, _resolve, future, durable)
        self._waiting = [entry for entry in self._waiting if entry[0] > durable]

    def fail(self, error: Callable[[], Exception]) -> None:
        """Tell everybody that it will not be; `error` makes a fresh exception for each."""
        for _, loop, future in self._waiting:
            _tell(loop, _fail, future, error())
        self._waiting = []


def _tell(
    loop: asyncio.AbstractEventLoop,
    how: Callable[[asyncio.Future[int], Any], None],
    future: asyncio.Future[int],
    what: object,
) -> None:
    with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(how, future, what)


def _resolve(future: asyncio.Future[int], lsn: int) -> None:
    if not future.done():
        future.set_result(lsn)


def _fail(future: asyncio.Future[int], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
