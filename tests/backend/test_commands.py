"""Calls handed to one thread: none is lost, none blocks whoever hands it over, and none that fails waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rollout_wal.backend.commands import Commands


class Loop(threading.Thread):
    """The least thread that runs commands."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.commands = Commands(self, lambda: RuntimeError("it has ended"))
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.commands.run(fatal=lambda: False)
        self.commands.refuse()


@pytest.fixture
def loop() -> Iterator[Loop]:
    thread = Loop()
    thread.start()
    yield thread
    thread.over = True
    thread.join()
    thread.commands.close()


def test_a_busy_thread_blocks_nobody_who_posts(loop: Loop) -> None:
    """A finalizer posts on whatever thread collects garbage, the busy one included: it must not wait for room."""
    begun, enough = threading.Event(), threading.Event()

    def be_busy() -> None:
        begun.set()
        enough.wait(60)

    loop.commands.post(be_busy)
    assert begun.wait(60)
    posting = threading.Thread(target=lambda: [loop.commands.post(int) for _ in range(5000)], daemon=True)
    posting.start()
    posting.join(30)
    stuck = posting.is_alive()
    enough.set()
    assert not stuck
    assert loop.commands.call(lambda: 3) == 3


def test_a_call_that_timed_out_itself_is_told(loop: Loop) -> None:
    """A network file system raises TimeoutError; so does waiting for a future."""

    def fail() -> None:
        raise TimeoutError("the disk")

    told: list[BaseException] = []

    def call() -> None:
        try:
            loop.commands.call(fail)
        except TimeoutError as error:
            told.append(error)

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(10)
    assert not caller.is_alive()
    assert [str(error) for error in told] == ["the disk"]


def test_a_thread_that_has_ended_refuses(loop: Loop) -> None:
    loop.over = True
    loop.join()
    with pytest.raises(RuntimeError, match="it has ended"):
        loop.commands.call(int)
