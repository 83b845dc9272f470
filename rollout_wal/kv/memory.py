"""Memory that a disk reads into and writes from without a copy: page-aligned, in huge pages, and used again.

The first touch of fresh memory costs more than the disk does, so what was taken once is kept.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

_HUGE: Final = 2 << 20


def aligned(size: int) -> NDArray[np.uint8]:
    """At least so many zero bytes that begin at a page. Only what is touched takes memory."""
    room = -(-size // _HUGE) * _HUGE if size >= _HUGE else -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


class Buffers:
    """Aligned buffers that are taken, given back and taken again. Thread-safe.

    Args:
        idle_max: how many are kept while nobody uses them.
    """

    def __init__(self, idle_max: int) -> None:
        self._idle_max = idle_max
        self._idle: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least so many bytes, with anything in it."""
        with self._lock:
            for i, buffer in enumerate(self._idle):
                if len(buffer) >= size:
                    return self._idle.pop(i)
        return aligned(size)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Give one back that nobody looks at any more. Of those that are too many the smallest go."""
        with self._lock:
            self._idle.append(buffer)
            if len(self._idle) > self._idle_max:
                del self._idle[min(range(len(self._idle)), key=lambda i: len(self._idle[i]))]
