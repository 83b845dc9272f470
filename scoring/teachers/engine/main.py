"""What an engine's process runs: it loads one model, scores what it is sent, and dies with the server.

    {"load": ...} ─▶ ready | broken        {"id", "tokens", "ask"} ─▶ {"id", "arrays" | "error"}
    {"drop": ids}                          {"head": True} ─▶ head, pieces of it, end
    {"clean": True}: when nothing runs

An exception while the engine computes ends the process: what an engine is worth after one is unknown. The server
starts another.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from importlib import import_module
from typing import Any, Protocol

from rollout_wal.backend.wire import Channel, Message

#: Bytes of a head in one message.
_PIECE = 16 << 20


class Runner(Protocol):
    """An engine with its model loaded."""

    def describe(self) -> Message:
        """device and dtype, as they really are; logits: how many a position has."""
        ...

    @property
    def unfinished(self) -> int:
        """Items that were added and have neither come back nor been dropped."""
        ...

    def add(self, item: int, tokens: bytes, ask: Message) -> None:
        """Tokens (int32, little-endian) that the engine reads, and the fields of `rows.Ask`. Raises ValueError."""
        ...

    def drop(self, items: list[int]) -> None: ...

    def clean(self) -> None:
        """Forget all KV, and what is in its memory: zero times a NaN that an item left there is a NaN in the next."""
        ...

    def step(self) -> list[tuple[int, Message]]:
        """One step of the engine; items that it finished, each with `rows.Rows.outcome`."""
        ...

    def head(self) -> Any:
        """A tensor [vocabulary, hidden size]; None where there is none that would rebuild the logits."""
        ...


def main(sock: int, server: int) -> None:
    """Args: file descriptors: of the socket to the server, and the pidfd of the server's process."""
    for fd in (sock, server):
        os.set_inheritable(fd, False)
    threading.Thread(target=_die_with, args=(server,), daemon=True).start()
    # A terminal's Ctrl-C and a preemption notice reach everybody: the server decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    channel = Channel(socket.socket(fileno=sock))
    status = 1
    try:
        status = _serve(channel)
    except BaseException as error:  # it ends here; the server should hear why
        traceback.print_exc()
        channel.send({"broken": f"{type(error).__name__}: {error}"[:4000]})
        channel.drain(5.0)
    finally:
        sys.stderr.flush()
        # An engine's own processes are of this group. Taking it down in good order takes longer than it is worth.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_group(status)


def _serve(channel: Channel) -> int:
    runner: Runner | None = None
    while True:
        busy = runner is not None and runner.unfinished
        for message in channel.receive(0.0 if busy else None):
            if runner is None:
                runner = _load(message["load"])
                channel.send({"ready": runner.describe()})
            elif "head" in message:
                _send_head(channel, runner)
            elif "drop" in message:
                runner.drop(message["drop"])
            elif "clean" in message:
                runner.clean()
            else:
                try:
                    runner.add(message["id"], message["tokens"], message["ask"])
                except ValueError as error:
                    channel.send({"id": message["id"], "error": str(error)})
        if channel.closed:
            return 0
        if runner is not None and runner.unfinished:
            for item, outcome in runner.step():
                channel.send({"id": item, **outcome})
        channel.flush()


def _load(config: Message) -> Runner:
    module, _, name = config["runner"].partition(":")
    runner: Runner = getattr(import_module(module), name)(config)
    return runner


def _send_head(channel: Channel, runner: Runner) -> None:
    import torch

    head = runner.head()
    if head is None:
        channel.send({"head": None})
        return
    half = head.dtype == torch.bfloat16
    channel.send({"head": {"bfloat16": half, "shape": list(head.shape)}})
    flat = head.contiguous().reshape(-1)
    size = _PIECE // (2 if half else 4)
    for start in range(0, len(flat), size):
        piece = flat[start : start + size]
        channel.send({"piece": (piece.view(torch.int16) if half else piece.float()).numpy().tobytes()})
        channel.drain(600.0)  # or all of it would lie in this process a second time
    channel.send({"end": True})


def _die_with(server: int) -> None:
    """A pidfd is readable when its process is gone, however it went. A socket can be held open by others."""
    poll = select.poll()
    poll.register(server, select.POLLIN)
    while not poll.poll():
        pass
    _end_group(1)


def _end_group(status: int) -> None:
    if os.getpgrp() == os.getpid():  # or it is not a group of ours
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(status)
