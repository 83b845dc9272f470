"""The reader process of a node: reads each step once, into memory that all local ranks map.

Started by the ranks (`python -m rollout_wal.dataset.node_reader CONFIG`), one wins the name, and it lives as long as a
rank is connected. It owns the memory; ranks own their place in the plan. That makes both ends expendable: a rank that
is gone holds nothing any more, and a rank whose reader is gone starts another and says where it was.

A step is loaded when a rank will need it soon, sent to every rank that has not had it, and freed when the last of those
has let go. Loading stays a few steps ahead of the slowest rank (`prefetch`), and waits when the memory is full: that is
the back-pressure.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import DatasetError, LoaderError, problem
from .prefetch import PrefetchDepth
from .reader_config import ReaderConfig
from .step_memory import StepMemory
from .wire import PROTOCOL, listen, receive, same_user, send

#: How long to sleep when there is nothing to do and no message comes.
_IDLE_S = 0.25


@dataclass(slots=True, eq=False)
class _Rank:
    """A connected rank. `sent` and `taken`: the first step that was not yet sent to it, or taken by it."""

    sock: socket.socket
    local_rank: int = -1
    sent: int = 0
    taken: int = 0
    leaving: bool = False

    @property
    def joined(self) -> bool:
        return self.local_rank >= 0


class NodeReader:
    """The event loop. One thread; while it reads, messages wait in the sockets.

    Raises:
        DatasetError: the plan or the dataset cannot be used; `run` has told the ranks.
    """

    def __init__(self, config: ReaderConfig, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._memory = StepMemory(config)
        self._ranks: dict[socket.socket, _Rank] = {}
        self._started = False
        self._last_join = time.monotonic()
        self._depth = PrefetchDepth(config.prefetch_max)

    def run(self) -> None:
        """Serve until every rank has gone, or something cannot be loaded: then every rank is told."""
        try:
            while self._serving():
                loaded = self._load_one()
                events = self._selector.select(0 if loaded else _IDLE_S)
                for key, _ in events:
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.fileobj)  # type: ignore[arg-type]
                if not events and not loaded:
                    self._memory.give_back()
        except DatasetError as error:
            self._tell_all(str(error))
            raise

    def _joined(self) -> list[_Rank]:
        return [rank for rank in self._ranks.values() if rank.joined]

    def _serving(self) -> bool:
        joined = self._joined()
        late = time.monotonic() - self._last_join > self._config.start_timeout_s
        if not self._started and (len(joined) == self._config.local_ranks or (joined and late)):
            self._started = True
        return bool(joined) or not (self._started or late)

    # --- messages ---

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if not same_user(sock):
            sock.close()
            return
        sock.setblocking(True)
        self._ranks[sock] = _Rank(sock)
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, sock: socket.socket) -> None:
        rank = self._ranks.get(sock)
        if rank is None:
            return  # dropped by an earlier event of the same round
        received = None
        try:
            received = receive(sock)
            if received is not None:
                self._handle(rank, received[0])
        except (LoaderError, KeyError, TypeError, ValueError) as error:
            self._refuse(rank, str(error))
            return
        if received is None:
            self._lost(rank)

    def _handle(self, rank: _Rank, message: Mapping[str, Any]) -> None:
        kind = message["kind"]
        if kind == "hello":
            self._hello(rank, message)
        elif kind == "take":
            rank.taken = int(message["step"]) + 1
            self._depth.taken(float(message["waited_s"]))
        elif kind == "release":
            self._memory.let_go(rank, int(message["step"]))
            self._free_what_nobody_needs()
        elif kind == "bye":
            # It needs nothing more, but may hold arrays still: it is dropped when it closes the connection.
            rank.leaving = True
            rank.sent = rank.taken = self._memory.steps + 1
            self._free_what_nobody_needs()

    def _hello(self, rank: _Rank, message: Mapping[str, Any]) -> None:
        name = self._config.name
        if message["protocol"] != PROTOCOL or message["config"] != self._config.pack():
            theirs = ReaderConfig.unpack(message["config"]) if message["protocol"] == PROTOCOL else "another protocol"
            raise LoaderError(
                problem(
                    f"the reader {name!r} of this node runs with {self._config}; this rank asks for {theirs}",
                    consequence="This rank was not served",
                    remedy="Give all ranks of a job the same settings, and each job a loader name of its own",
                )
            )
        if any(other.local_rank == message["local_rank"] for other in self._joined()):
            raise LoaderError(
                problem(
                    f"local rank {message['local_rank']} is connected to reader {name!r} already",
                    consequence="This one was not served",
                    remedy="Number the ranks of a node apart, and give each job a loader name of its own",
                )
            )
        start, local_rank = int(message["start_step"]), int(message["local_rank"])
        welcome = {"kind": "welcome", "pid": os.getpid(), "steps": self._memory.steps, "schemas": self._memory.schemas}
        if not self._tell(rank, welcome, self._memory.fd_for_ranks):
            return  # gone before it had joined: the others are served all the same
        rank.sent = rank.taken = start
        rank.local_rank = local_rank
        self._last_join = time.monotonic()

    # --- ranks that go ---

    def _drop(self, rank: _Rank) -> None:
        self._selector.unregister(rank.sock)
        rank.sock.close()
        del self._ranks[rank.sock]
        self._memory.let_go(rank)
        self._free_what_nobody_needs()

    def _lost(self, rank: _Rank) -> None:
        """The connection ended: the process has closed the loader or died."""
        self._drop(rank)
        if rank.joined and not rank.leaving and self._config.stop_on_rank_death:
            raise LoaderStopped(
                problem(
                    f"local rank {rank.local_rank} died",
                    consequence="Loading stopped for all ranks of this node, as configured",
                    remedy="Start the job again from its last step, or load with on_rank_death='carry_on'",
                )
            )

    def _refuse(self, rank: _Rank, why: str) -> None:
        self._tell(rank, {"kind": "error", "message": why})
        if rank.sock in self._ranks:
            self._drop(rank)

    def _tell(self, rank: _Rank, message: dict[str, Any], fd: int | None = None) -> bool:
        try:
            send(rank.sock, message, fd)
        except OSError:
            return False  # it is gone: its socket says so at the next look
        return True

    def _tell_all(self, why: str) -> None:
        for rank in list(self._ranks.values()):
            self._tell(rank, {"kind": "error", "message": why})

    # --- steps ---

    def _load_one(self) -> bool:
        """Load the next step that a rank will need, if there is room; whether one was loaded."""
        ranks = self._joined() if self._started else []
        first = min((rank.taken for rank in ranks), default=0)
        loaded = False
        for step in range(first, min(first + self._depth.value, self._memory.steps)):
            if step not in self._memory and any(rank.sent <= step for rank in ranks):
                loaded = self._memory.load(step)
                break
        self._send_what_is_due(ranks)
        return loaded

    def _send_what_is_due(self, ranks: list[_Rank]) -> None:
        for rank in ranks:
            while rank.sent in self._memory:
                place = self._memory.hold(rank.sent, rank)
                if not self._tell(rank, {"kind": "step", "step": rank.sent, **place}):
                    break
                rank.sent += 1
            if rank.sent == self._memory.steps and self._tell(rank, {"kind": "end"}):
                rank.sent += 1

    def _free_what_nobody_needs(self) -> None:
        ranks = self._joined()
        self._memory.free(lambda step: any(rank.sent <= step for rank in ranks))


class LoaderStopped(LoaderError):
    """Loading stops for everybody, as configured."""


def main(raw: str) -> int:
    """Serve under the configured name, or leave quietly if another reader has it."""
    config = ReaderConfig.unpack(bytes.fromhex(raw))
    listener = listen(config.name)
    if listener is None:
        return 0
    try:
        reader = NodeReader(config, listener)
    except DatasetError as error:
        refuse_everybody(listener, str(error), config.start_timeout_s)
        return 1
    try:
        reader.run()
    except LoaderStopped:
        return 1
    except DatasetError as error:
        print(f"loader {config.name!r}: {error}", file=sys.stderr)
        return 1
    return 0


def refuse_everybody(listener: socket.socket, why: str, timeout_s: float) -> None:
    """Tell the ranks that are about to connect why there is nothing to load."""
    listener.settimeout(min(timeout_s, 2.0))
    while True:
        try:
            sock, _ = listener.accept()
            with sock:
                send(sock, {"kind": "error", "message": why})
        except OSError:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
