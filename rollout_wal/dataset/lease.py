"""A rank's connection to its reader, and the steps that it holds through it."""

from __future__ import annotations

import mmap
import os
import socket
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .wire import send


class Lease:
    """A connection to a reader and the steps that are held through it; closed when both are done with.

    It speaks for the process that made it only. A child that this one forks (a `DataLoader` worker, say) inherits the
    mappings and the socket, and collects its own copies of the arrays: that lets go of nothing.
    """

    def __init__(self, sock: socket.socket, fd: int) -> None:
        self.sock = sock
        self.held: set[int] = set()
        self._fd = fd
        self._leaving = False
        self._pid = os.getpid()

    def map(self, step: int, offset: int, size: int) -> NDArray[np.uint8]:
        """Map a step's extent. It is let go of when the array, and with it the last view of it, is collected."""
        # A mapping of its own for each step, so that a page this rank wrote to is never mistaken for the next step's.
        mapped = mmap.mmap(self._fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        memory_B: NDArray[np.uint8] = np.frombuffer(mapped, dtype=np.uint8)
        self.held.add(step)
        # numpy gives every view the array that owns the mapping as its base, so this one dies last.
        weakref.finalize(memory_B, self._let_go, step)
        return memory_B

    def leave(self) -> None:
        """Take no more steps; close when nothing is held."""
        self._leaving = True
        self._say({"kind": "bye"})
        self._close_if_done()

    def _let_go(self, step: int) -> None:
        self.held.discard(step)
        self._say({"kind": "release", "step": step})
        self._close_if_done()

    def _say(self, message: dict[str, Any]) -> None:
        if os.getpid() == self._pid:
            with suppress(OSError):  # the reader may have gone first: then it holds nothing for anybody
                send(self.sock, message)

    def _close_if_done(self) -> None:
        if self._leaving and not self.held:
            self.sock.close()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
