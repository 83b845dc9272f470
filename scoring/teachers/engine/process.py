"""The server's side of an engine's process: start it, talk to it, end it with all that it started.

It is started anew, not forked: the server has threads. It leads a process group, so that the processes that an engine
starts for itself go with it, and it watches the server, so that it does not outlive even a SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rollout_wal.backend.wire import Channel, Message
from rollout_wal.errors import BackendError

from ...errors import TeacherFailed, problem

#: A load that takes longer has failed.
LOAD_S: Final = 3600.0
#: How long the kernel may take to free the memory of a process that was killed.
_END_S: Final = 30.0
_POLL_S: Final = 0.25
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]) or sys.path; "
    "from scoring.teachers.engine.main import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class EngineProcess:
    """One engine with one model.

    Args:
        teacher: its id, for messages.
        load: see `main`.
        python: the interpreter; None: this one, with this one's search path.
        environment: on top of this process's.

    Raises:
        TeacherFailed: it cannot be started.
    """

    def __init__(self, teacher: str, load: Message, *, python: Path | None, environment: Mapping[str, str]) -> None:
        self._teacher = teacher
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        server = os.pidfd_open(os.getpid())
        path = [p or os.getcwd() for p in sys.path] if python is None else []
        fds = [theirs.fileno(), server]
        try:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-c", _START, *map(str, fds), json.dumps(path)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=2,  # engines talk; a server's standard output is not for that
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise TeacherFailed(self._says(f"its process cannot be started: {error}")) from error
        finally:
            os.close(server)
            theirs.close()
        self._channel = Channel(ours)
        self._why = ""
        self._end = weakref.finalize(self, _end, self._process, self._channel)
        self._channel.send({"load": load})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._end.alive and not self._channel.closed and self._process.poll() is None

    def ready(self) -> Message:
        """What the engine says of itself, once it has loaded. Raises TeacherFailed: it has not."""
        deadline = time.monotonic() + LOAD_S
        while time.monotonic() < deadline:
            for message in self.receive():
                if "ready" in message:
                    found: Message = message["ready"]
                    return found
            if not self.alive:
                self.receive()  # its last words
                raise TeacherFailed(self._says(f"it ended while it loaded: {self.why()}"))
        raise TeacherFailed(self._says(f"it has not loaded within {LOAD_S:g} s"))

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def receive(self) -> list[Message]:
        """What has come; waits a moment for it. Nothing comes any more from one that is not alive."""
        # Poll: the socket may be held open by a process that the engine has forked.
        try:
            gone = self._process.poll() is not None
            messages = self._channel.receive(0.0 if gone else _POLL_S)
        except BackendError as error:
            self._why = str(error)
            self.end()
            return []
        for message in messages:
            self._why = message.get("broken", self._why)
        return [message for message in messages if "broken" not in message]

    def why(self) -> str:
        """Why it is dead, as far as is known."""
        status = self._process.poll()
        if self._why:
            return self._why
        how = "its connection was lost" if status is None else f"it ended with status {status}"
        return f"{how}; what it said is on standard error"

    def end(self) -> None:
        """Kill it and all of its processes, and wait until their memory is free."""
        self._end()

    def _says(self, what: str) -> str:
        return problem(
            f"the engine of teacher {self._teacher!r}: {what}",
            consequence="Items that ask for it fail; other teachers are not affected",
            remedy="See the server's standard error; if memory ran out, lower kv_cache_bytes or token_budget",
        )


def _end(process: subprocess.Popen[bytes], channel: Channel) -> None:
    channel.close()
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _END_S
    while _group_runs(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _group_runs(group: int) -> bool:
    """Whether a process of the group is more than a zombie that nobody has waited for."""
    if not _signal_group(group, 0):
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state not in "ZX":
            return True
    return False
