"""Directories whose names survive a crash of the machine: a log in a directory that can be lost is no log."""

from __future__ import annotations

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """mkdir -p, with every name on the way synced.

    Those that are there already as well: whoever made them may have died before it came to that. Names that this
    process could not have made, and those of mounted file systems, are none of ours.
    """
    path = path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    for directory in (path, *path.parents):
        if not os.path.ismount(directory) and os.access(directory.parent, os.W_OK):
            sync_directory(directory.parent)
