"""Work that other threads hand over: one thread does it, between two rounds of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Commands:
    """A queue of calls, and a socket that wakes whoever sleeps until there is one.

    Args:
        thread: the thread that runs them.
        failure: why nothing more will be run, once that thread has ended.
    """

    def __init__(self, thread: threading.Thread, failure: Callable[[], BaseException]) -> None:
        self._thread = thread
        self._failure = failure
        self._queue: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        # When it is full the thread will wake up anyway. Waiting for room could be for ever: a finalizer posts on
        # whatever thread collects garbage, and that may be the one that would have to make room.
        self._wake_w.setblocking(False)

    # -- from other threads -------------------------------------------------------------------------------------

    def call(self, what: Callable[[], T]) -> T:
        """Have `what` run and return what it returns, or raise what it raises."""
        if threading.current_thread() is self._thread:
            return what()
        if not self._thread.is_alive():
            raise self._failure()
        future = self.post(what)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # it may be what the call itself raised
                    return future.result()
                if not self._thread.is_alive():
                    raise self._failure() from None

    def post(self, what: Callable[[], T]) -> Future[T]:
        """Have `what` run, and do not wait for it. Safe anywhere, a finalizer included."""
        future: Future[T] = Future()
        self._queue.append((what, future))
        self.wake()
        return future

    def wake(self) -> None:
        """End the thread's sleep."""
        with contextlib.suppress(OSError):  # it has ended, or is about to wake up
            self._wake_w.send(b"\0")

    # -- the thread ---------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when the thread is to wake up."""
        return self._wake_r.fileno()

    def awake(self) -> None:
        """The thread is awake: what has woken it is used up."""
        self._wake_r.recv(4096)

    def run(self, *, fatal: Callable[[], bool]) -> None:
        """Run all that is queued. An exception is the caller's alone, unless `fatal()`: then it is raised here too."""
        while self._queue:
            what, future = self._queue.popleft()
            try:
                future.set_result(what())
            except Exception as error:
                future.set_exception(error)
                if fatal():
                    raise

    def refuse(self) -> None:
        """Nothing more is run: tell everybody who waits."""
        while self._queue:
            self._queue.popleft()[1].set_exception(self._failure())

    def close(self) -> None:
        self._wake_r.close()
        self._wake_w.close()
