"""Appends records to a data file of one's own: gathered in aligned memory, written while the next ones are gathered."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Final

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from .data_files import Place, data_path, open_direct, sync_folder, write_at
from .format import HEADER_BYTES, Header, Kind, record_bytes
from .memory import Buffers

#: A buffer with as many bytes is written. It has room for a record of that size on top.
_BATCH_BYTES: Final = 8 << 20
_BUFFER_BYTES: Final = 2 * _BATCH_BYTES
#: Buffers that are being written while another is filled.
_WRITING_MAX: Final = 3

Fill = Callable[[NDArray[np.uint8]], None]


class DataWriter:
    """Appends records in large aligned writes. `sync` makes everything appended durable.

    After an error the file is given up, never synced again: the next record goes to a new one.

    Args:
        folder: of the data files.
        file_bytes: size at which the next file is begun.
        io: threads that write.
    """

    def __init__(self, folder: Path, file_bytes: int, io: Executor) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._io = io
        self._fd = -1
        self._file_id = b""
        self._end = 0
        """Offset behind the last record, written or not."""
        self._buffers = Buffers(_WRITING_MAX + 1)
        self._buffer: NDArray[np.uint8] | None = None
        self._filled = 0
        """Bytes of the buffer; they end at `_end`."""
        self._writing: deque[tuple[Future[None], NDArray[np.uint8]]] = deque()
        self._unsynced = False

    def append(
        self, kind: Kind, key: bytes, stored: int, fill: Fill, *, codec: int, itemsize: int, tokens: int, raw: int
    ) -> Place:
        """Queue a record whose payload `fill` writes into the `stored` bytes that it is given.

        Raises:
            OSError: everything since the last `sync` is lost. Whatever `fill` raises: this record is not there.
        """
        if self._fd < 0 or self._end >= self._file_bytes:
            self.sync()
            self._next_file()
        place = Place(self._file_id, self._end, record_bytes(stored))
        record = self._room(place.length)
        payload = record[HEADER_BYTES : HEADER_BYTES + stored]
        fill(payload)
        record[HEADER_BYTES + stored :] = 0
        crc = crc32c(payload.data)
        header = Header(kind, codec, itemsize, tokens, stored, raw, key, place.file_id, place.offset, crc)
        record[:HEADER_BYTES] = np.frombuffer(header.encode(), np.uint8)
        self._filled += place.length
        self._end += place.length
        if self._filled >= _BATCH_BYTES:
            self._flush()
        return place

    def sync(self) -> None:
        """Raises OSError: nothing since the last sync may be relied upon."""
        if self._fd < 0:
            return
        try:
            self._flush()
            while self._writing:
                self._wait()
            if self._unsynced:
                os.fdatasync(self._fd)
                self._unsynced = False
        except BaseException:
            self.abandon()
            raise

    def retire(self, files: Mapping[bytes, tuple[int, int]]) -> None:
        """End the current file if most of it is garbage, so that it can be collected. Raises OSError."""
        if self._fd >= 0 and 2 * files.get(self._file_id, (0, 0))[1] < self._end:
            self.sync()
            self.abandon()

    def abandon(self) -> None:
        """Give the current file up, with what was not synced."""
        for future, buffer in self._writing:
            future.exception()  # its descriptor must stay open for it
            self._buffers.give(buffer)
        self._writing.clear()
        self._filled, self._unsynced = 0, False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _room(self, length: int) -> NDArray[np.uint8]:
        if self._buffer is not None and self._filled + length > len(self._buffer):
            self._flush()
            if self._buffer is not None:  # empty, and too small
                self._buffers.give(self._buffer)
                self._buffer = None
        if self._buffer is None:
            self._buffer = self._buffers.take(max(length, _BUFFER_BYTES))
        return self._buffer[self._filled : self._filled + length]

    def _flush(self) -> None:
        """Have the buffer written. Raises OSError: an earlier write failed."""
        if self._buffer is None or not self._filled:
            return
        buffer, data, offset = self._buffer, self._buffer[: self._filled].data, self._end - self._filled
        self._buffer, self._filled, self._unsynced = None, 0, True
        self._writing.append((self._io.submit(write_at, self._fd, data, offset), buffer))
        try:
            while len(self._writing) > _WRITING_MAX:
                self._wait()
        except BaseException:
            self.abandon()
            raise

    def _wait(self) -> None:
        future, _ = self._writing[0]
        future.result()
        self._buffers.give(self._writing.popleft()[1])

    def _next_file(self) -> None:
        self.abandon()
        file_id = uuid.uuid4().bytes
        fd = open_direct(data_path(self._folder, file_id), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync_folder(self._folder)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._file_id, self._end = fd, file_id, 0


def copy_of(data: memoryview | bytes) -> Fill:
    """A `fill` of bytes that there are already."""

    def fill(into: NDArray[np.uint8]) -> None:
        into[:] = np.frombuffer(data, np.uint8)

    return fill
