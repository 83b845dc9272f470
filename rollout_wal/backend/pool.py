"""The backend's view of its worker processes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from ..engine_state import EngineState
from ..errors import RolloutWalError
from ..log.report import Reported
from ..log.segment import Frame
from ..records import Bind, RecordType
from ..step import decode_step
from .nursery import Child
from .wire import Channel, Message, wait_for


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


class WorkerHandle:
    """One rank: the process that holds it now, and what that process has shown so far."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self.state = WorkerState.DEAD
        self.running: dict[int, int] = {}
        """rollout -> attempt"""
        self.mirror = EngineState()
        """What the worker's log holds durably, as far as it has told."""
        self.child: Child | None = None
        self.channel: Channel | None = None
        self.starts = 0
        self.failures = 0
        """Deaths in a row before the worker was ready."""
        self.failure: RolloutWalError | None = None
        """What this process said of itself before it ended."""
        self.stopped_at = 0.0
        """When it said that it is done (monotonic seconds)."""
        self.steps = 0
        self.lag_bytes = 0
        self.writer = Reported()
        """Its log's numbers, over all the processes that it had."""

    def born(self, child: Child, sock: socket.socket) -> None:
        self.child, self.channel = child, Channel(sock)
        self.state = WorkerState.STARTING
        self.mirror = EngineState()
        self.failure = None
        self.stopped_at = 0.0
        self.starts += 1
        self.steps = 0

    def send(self, message: Message) -> None:
        if self.channel is not None:
            self.channel.send(message)

    def signal(self, number: int) -> None:
        """Raises nothing if the process is gone already."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.child.pidfd, number)

    def stopping(self) -> None:
        """It has said that it is done, and is given nothing more. Its process may still hang while it ends."""
        self.state = WorkerState.STOPPING
        self.stopped_at = time.monotonic()

    def dead(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended; waits for it at most that long."""
        return self.child is None or bool(wait_for(self.child.pidfd, select.POLLIN, timeout_s))

    def bury(self) -> None:
        """The process is dead: let go of what belonged to it."""
        if self.channel is not None:
            self.channel.close()
        if self.child is not None:
            os.close(self.child.pidfd)
        self.child = self.channel = None
        self.state = WorkerState.DEAD

    def apply(self, frames: list[list[Any]]) -> tuple[list[tuple[int, int]], set[tuple[int, int]], int]:
        """Take in frames that are durable. Returns the attempts newly bound, those whose engine said that they are
        over, and how many tokens there were."""
        bound: list[tuple[int, int]] = []
        over: set[tuple[int, int]] = set()
        tokens = 0
        for kind, flags, lsn, payload in frames:
            self.mirror.apply(Frame(kind, flags, lsn, 0, 0, memoryview(payload)))
            if kind == RecordType.BIND:
                bind = Bind.decode(payload)
                bound.append((bind.rollout, bind.attempt))
            elif kind == RecordType.STEP:
                step = decode_step(payload)
                tokens += len(step.token_N)
                for slot in step.slot_R[step.finish_R != 0].tolist():
                    # Unbound: a rollout that was aborted and released, while its last tokens were on their way.
                    if stream := self.mirror.bound.get(slot):
                        over.add((stream.rollout, stream.attempt))
        return bound, over, tokens

    def forget(self, keys: Iterable[tuple[int, int]]) -> None:
        """Let go of attempts that nobody needs any more. Rows of them that still arrive are nobody's."""
        for key in keys:
            self.mirror.forget_attempt(key)
