"""Append-only data files. Each process appends to files of its own; everybody reads all of them.

The name of a file is its random id. Its writer holds a lock on it, so that nobody else removes it while records are
written that no index knows yet; where locks do not work, such records are lost, which costs a prefill.

Files are read and written past the page cache where the file system can do that (O_DIRECT): the bytes then go between
the disk and our memory without a copy, and a snapshot does not push the model's files out of the cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import KvError, problem
from .format import ALIGNMENT

_SUFFIX: Final = ".kv"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is."""

    file_id: bytes
    offset: int
    length: int
    """Of the whole record, padding included."""


class KvDamage(KvError):
    """A record that cannot be used. `reason` is one word for metrics."""

    def __init__(self, reason: str, place: Place, what: str) -> None:
        super().__init__(
            problem(
                f"KV record at offset {place.offset} of {place.file_id.hex()}{_SUFFIX}: {what}",
                consequence="It is not used; its tokens are computed again",
                remedy="Check the disk if this goes on; the store may be deleted at any time",
            )
        )
        self.reason = reason


def data_path(folder: Path, file_id: bytes) -> Path:
    return folder / f"{file_id.hex()}{_SUFFIX}"


def data_files(folder: Path) -> Iterator[tuple[bytes, Path]]:
    """(file id, path) of every data file."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(ValueError):
            yield bytes.fromhex(path.stem), path


def sync_folder(folder: Path) -> None:
    """The names in it are durable when this returns."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_direct(path: Path, flags: int) -> int:
    """Open past the page cache where that works, and through it elsewhere. Raises OSError."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if flags & os.O_CREAT:  # the name may have been made before it was refused
            flags &= ~os.O_EXCL
        return os.open(path, flags | os.O_CLOEXEC, 0o644)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of it. Memory, length and offset are aligned. Raises OSError."""
    done = 0
    while done < len(data):
        try:
            count = os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            _go_on_buffered(fd, error)
            continue
        done += count
        if count % ALIGNMENT:
            _set_buffered(fd)  # a direct transfer could not go on from there


def read_at(fd: int, into: memoryview, offset: int) -> int:
    """Read until it is full or the file ends; returns the bytes read. Memory, length and offset are aligned."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            _go_on_buffered(fd, error)
            continue
        done += count
        if not count:
            break
        if count % ALIGNMENT:
            _set_buffered(fd)  # as a rule the file ends here: the next read says so
    return done


def _go_on_buffered(fd: int, error: OSError) -> None:
    """File systems that take O_DIRECT when a file is opened may still refuse this memory or length."""
    if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise error
    _set_buffered(fd)


def _set_buffered(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
