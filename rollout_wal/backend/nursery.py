"""The nursery: a process that has imported everything a worker needs, and forks workers from itself.

Importing torch and transformers takes seconds; a worker that dies every few seconds would do nothing else. The nursery
imports once, runs no thread and touches no device, so a fork of it is a clean start. It ends when the backend does.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from ..errors import BackendError, WorkerFailed, problem
from ..third_party import quiet_imports
from .wire import Message, receive_with_fds, send_with_fds

_WORKER_MAIN: Final = "rollout_wal.backend.worker:worker_main"
"""What a forked process runs, unless its configuration names another `main`."""

# Not `-m`: that would import this module twice.
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[4]); from rollout_wal.backend.nursery import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
)


@dataclass(frozen=True, slots=True)
class Child:
    """A forked worker."""

    pid: int
    pidfd: int
    """Readable once the worker is dead; signals sent through it can never reach another process."""


class Nursery:
    """The backend's side. A nursery that dies is replaced when the next worker is needed; its workers live on."""

    def __init__(self, module: str, *, threads: int) -> None:
        self._module = module
        self._threads = threads
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threads = str(self._threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        # Sockets alone do not tell when this process is dead: whatever was forked from it holds them too.
        backend = os.pidfd_open(os.getpid())
        try:
            with theirs:
                fds = [theirs.fileno(), backend]
                # The same search path as here: an engine's factory may live beside the caller's script.
                arguments = [*map(str, fds), self._module, json.dumps([p or os.getcwd() for p in sys.path])]
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *arguments], pass_fds=fds, env=env, stdin=subprocess.DEVNULL
                )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(backend)
        self._sock = ours

    def fork(self, config: Message) -> tuple[Child, socket.socket]:
        """A new worker, and the socket to it.

        Raises:
            WorkerFailed: the nursery is gone, and so is its successor; their messages are on standard error.
            BackendError: the configuration is too long, or this process has no descriptor left.
        """
        for again in (True, False):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                try:
                    send_with_fds(self._sock, config, [theirs.fileno()])
                    reply, fds = receive_with_fds(self._sock)
                except OSError:
                    reply, fds = None, []
                except BackendError:  # another try would end the same way
                    ours.close()
                    raise
            if reply is not None:
                return Child(reply["pid"], fds[0]), ours
            ours.close()
            self.close()
            if again:
                self._start()
        raise WorkerFailed(
            problem(
                f"the process that starts workers ended with status {self._process.poll()}, twice",
                consequence="No worker can be started; everything acknowledged is in the log",
                remedy="See its messages on standard error (a missing package, as a rule), then start again",
            )
        )

    def close(self) -> None:
        """Its workers are not touched."""
        self._sock.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(fd: int, backend: int, module: str) -> None:
    """The nursery's loop.

    Args:
        fd: of the socket to the backend.
        backend: pidfd of the backend's process.
        module: the engine's, which is imported once for all workers.
    """
    quiet_imports()
    import_module(module)
    # A terminal's Ctrl-C reaches the whole process group: the backend decides what it means, not each worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A preemption notice may reach all processes at once: the nursery is needed until the backend is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        selector.register(wake_r, selectors.EVENT_READ)
        selector.register(backend, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == backend:
                    os._exit(0)
                if key.fileobj is sock:
                    config, fds = receive_with_fds(sock)
                    if config is None:
                        os._exit(0)  # taking the imported libraries down in good order takes longer than they are worth
                    pid = os.fork()
                    if pid == 0:
                        _child(sock, fds[0], {**config, "backend": backend}, (wake_r, wake_w))
                    os.close(fds[0])
                    # Taken before the child can be reaped: from here on the number alone is never used.
                    pidfd = os.pidfd_open(pid)
                    send_with_fds(sock, {"pid": pid}, [pidfd])
                    os.close(pidfd)
                else:
                    os.read(wake_r, 4096)
                    _reap()


def _child(nursery: socket.socket, fd: int, config: Message, pipe: tuple[int, int]) -> None:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nursery.close()
        for end in pipe:
            os.close(end)
        if config.get("devices") is not None:  # read when the device is first touched, which this process has not done
            os.environ["CUDA_VISIBLE_DEVICES"] = config["devices"]
        module, _, function = str(config.get("main", _WORKER_MAIN)).partition(":")
        status = getattr(import_module(module), function)(socket.socket(fileno=fd), config)
    finally:
        os._exit(status)


def _reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
