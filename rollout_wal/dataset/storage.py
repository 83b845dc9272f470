"""The seam to the file system: files that appear whole and durable, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crc32c import crc32c

from ..log.storage import make_dirs_durable

#: Arrow writes a batch in dozens of pieces, most of them of a few bytes; they are gathered up to this size.
_BUFFER_BYTES = 1 << 18


class FileSink:
    """A file being written: what pyarrow needs of a file object, plus a running checksum and position."""

    closed = False

    def __init__(self, storage: Storage, fd: int) -> None:
        self._storage = storage
        self._fd = fd
        self._buffer = bytearray()
        self.position = 0
        self.checksum = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.position += len(view)
        if len(self._buffer) + len(view) > _BUFFER_BYTES:
            self.drain()
        if len(view) > _BUFFER_BYTES:
            self._write_through(view)
        else:
            self._buffer += view
        return len(view)

    def drain(self) -> None:
        """Hand everything to the kernel."""
        if self._buffer:
            self._write_through(memoryview(self._buffer))
            self._buffer = bytearray()

    def _write_through(self, view: memoryview) -> None:
        self.checksum = crc32c(view, self.checksum)
        done = 0
        while done < len(view):
            done += self._storage.write(self._fd, view[done:])

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        """Arrow flushes when it closes a file; `Storage.new_file` drains once, before its sync."""

    def close(self) -> None:
        """The descriptor belongs to `Storage.new_file`."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class Storage:
    """The system calls by which a dataset changes. Tests replace single ones to fail or to kill the process."""

    def __init__(self) -> None:
        self._durable: set[Path] = set()
        """Directories whose names are durable."""

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def fsync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def make_directory(self, path: Path) -> None:
        """Create it and its parents; durable, so that what is synced into it later cannot lose its way.

        What is there already may have been made by a process that died before it had synced the parent. So that is done
        here, once.
        """
        make_dirs_durable(path, self.fsync_directory, self._durable)

    @contextmanager
    def new_file(self, path: Path) -> Iterator[FileSink]:
        """Write a file that appears under its name only when it is complete and its bytes are durable.

        The name itself is durable after `fsync_directory` of its folder: once for many files.
        """
        temporary = path.with_name(path.name + ".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            sink = FileSink(self, fd)
            yield sink
            sink.drain()
            self.fsync(fd)
        except BaseException:
            # Best effort, on a path that is failing already: a left-over is found by `vacuum`.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self.rename(temporary, path)

    def publish(self, data: bytes, temporary: Path, target: Path) -> bool:
        """Durably create `target` with these bytes unless it exists. True if this call created it.

        link(2) rather than rename(2): of two that publish at once exactly one wins, and nobody needs a lock that a
        dead process could still hold.
        """
        with self.new_file(temporary) as sink:
            sink.write(data)
        try:
            self.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            self.unlink(temporary)
        self.fsync_directory(target.parent)
        return True
