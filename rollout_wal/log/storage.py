"""The file-system seam: the few operations a log needs, and what each of them promises.

Everything above this file is tested against a simulated disk that keeps these promises and no others:

- `pwrite` may be torn by a crash at any 512-byte sector, and reaches the disk in any order, until `sync` returns.
- a created, renamed or unlinked name may be lost or kept by a crash until `sync_dir` returns.
- after an error of `sync` or `sync_dir` nothing is known about what reached the disk, and asking again tells nothing:
  the kernel may have dropped the dirty pages and marked them clean.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

_libc = ctypes.CDLL(None, use_errno=True)


class File(Protocol):
    """An open file. Offsets and lengths in bytes."""

    def pwrite(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of it. Raises OSError; then nothing is known about the range."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        ...

    def sync(self) -> None:
        """What was written is durable when this returns (fdatasync)."""
        ...

    def size(self) -> int: ...

    def close(self) -> None: ...


class Storage(Protocol):
    """One flat directory of files."""

    @property
    def label(self) -> str:
        """For messages: where this is."""
        ...

    def create(self, name: str) -> File:
        """A new, empty file. Raises FileExistsError: exactly one of several racing callers creates it."""
        ...

    def open(self, name: str, *, write: bool = False) -> File: ...

    def exists(self, name: str) -> bool:
        """What cannot be told (no permission, a dead mount) may read as absent."""
        ...

    def list(self) -> Sequence[str]: ...

    def rename(self, old: str, new: str) -> None:
        """Atomic; replaces `new`."""
        ...

    def unlink(self, name: str) -> None: ...

    def sync_dir(self) -> None:
        """The names of this directory are durable when this returns."""
        ...


class OsFile:
    """A file of the operating system, by descriptor."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pwrite(self, data: bytes | memoryview, offset: int) -> None:
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):  # a short write: the disk may be full, and the next call says so
            more = os.pwrite(self._fd, memoryview(data)[written:], offset + written)
            if more == 0:
                raise OSError(5, "pwrite wrote nothing")
            written += more

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) in (0, length):
            return data
        parts = [data]
        got = len(data)
        while got < length:
            part = os.pread(self._fd, length - got, offset + got)
            if not part:
                break
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class OsStorage:
    """A directory of the operating system. Opened for writing it is made, with its parents, and durably there."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if create:
            make_dirs_durable(self.path)
        self._dir = f"{self.path}{os.sep}"

    @property
    def label(self) -> str:
        return str(self.path)

    def create(self, name: str) -> OsFile:
        return OsFile(os.open(self._dir + name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))

    def open(self, name: str, *, write: bool = False) -> OsFile:
        return OsFile(os.open(self._dir + name, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC))

    def exists(self, name: str) -> bool:
        # Not stat: this runs twice between every sync and its acknowledgement, and an exception for the name that is
        # rightly missing costs more than the look-up. What cannot be told reads as absent; the fence therefore
        # believes an absence only of a directory in which it has just seen its own claim.
        return os.access(self._dir + name, os.F_OK)

    def list(self) -> Sequence[str]:
        return os.listdir(self.path)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._dir + old, self._dir + new)

    def unlink(self, name: str) -> None:
        os.unlink(self._dir + name)

    def sync_dir(self) -> None:
        sync_directory(self.path)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs_durable(
    path: Path, sync: Callable[[Path], None] = sync_directory, durable: set[Path] | None = None
) -> None:
    """mkdir -p, with every name on the way synced: a log in a directory that a crash can lose is no log.

    Also the names that were there already: whoever made them may have died before it had synced them, and a name that
    can be seen can still be lost with the machine. Up to the mount point, which no mkdir has made.

    `sandbox_log.directories.make_directory` is the same for those that may not import this.

    Args:
        sync: makes the names in a directory durable.
        durable: directories whose names are known to be, kept by the caller from one time to the next.
    """
    real = Path(os.path.realpath(path))  # the names on the way to a link's target are those that matter
    known = set() if durable is None else durable
    for directory in reversed([p for p in (real, *real.parents) if not p.exists()]):
        known.discard(directory)
        directory.mkdir(exist_ok=True)
    names = []
    for at in (real, *real.parents):
        if os.path.ismount(at):
            break
        if at not in known:
            names.append(at)
    for at in names:
        try:
            sync(at.parent)
        except PermissionError:
            # Who may not write there has made no name in it. Who may write and not read can only sync all there is.
            if os.access(at.parent, os.W_OK):
                _sync_file_system(real)
                break
    known.update(names)


def _sync_file_system(directory: Path) -> None:
    """Sync the file system that a directory is in, and no other: one that hangs elsewhere is none of ours."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(fd)
