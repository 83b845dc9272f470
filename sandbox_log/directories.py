"""Directories whose names survive a crash of the machine: a log in a directory that can be lost is no log."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """mkdir -p, with every name on the way synced, up to the mount point, which no mkdir has made.

    Those that are there already as well: whoever made them may have died before it came to that.

    `rollout_wal.log.storage.make_dirs_durable` is the same for those that may not import this.
    """
    real = Path(os.path.realpath(path))  # the names on the way to a link's target are those that matter
    real.mkdir(parents=True, exist_ok=True)
    for at in (real, *real.parents):
        if os.path.ismount(at):
            break
        try:
            sync_directory(at.parent)
        except PermissionError:
            # Who may not write there has made no name in it. Who may write and not read can only sync all there is.
            if os.access(at.parent, os.W_OK):
                _sync_file_system(real)
                break


def _sync_file_system(directory: Path) -> None:
    """Sync the file system that a directory is in, and no other: one that hangs elsewhere is none of ours."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(fd)
