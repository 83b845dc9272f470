"""Payload files, and the fastest way of their bytes out of the page cache.

The kernel's copy (`preadv`) fetches each cache line of its target before it overwrites it, so a third of what the
memory can move goes into reading what is thrown away. The C library's memcpy, from a mapping, does not where a copy is
long enough (`LONG_COPIES`), but the pages have to be set up and taken down again. Which is faster depends on the
machine, so large pieces are copied in the way that was (`CopyChoice`); small ones, for which the pages would cost more
than they save anywhere, are read.

A read of a mapped page that cannot be had (the file was cut short, the disk fails) is a SIGBUS, which would end the
process without a word. So pages are populated first, by a call that fails with an error instead; a piece that could not
be populated is read, and reading says what is wrong. Payload files do not change once they are committed.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path

from .copy_choice import CopyChoice
from .reader import damaged

#: Pieces from this size on may be copied from a mapping.
MAPPED_BYTES_MIN = 96 << 10
#: For the environment of processes that copy: from which length on glibc's memcpy writes past the caches (without it,
#: from about the size of the last-level cache, which no piece has). Other C libraries do not read it.
LONG_COPIES = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x10000"}

_OPEN_FILES_MAX = 256
_PAGE = mmap.PAGESIZE
#: The kernel maps neighbours along with a page: those of the same 64 KiB or, where the cache holds a large folio, as
#: much of that as it likes. None is larger than a huge page.
_AROUND_BYTES = 2 << 20
# From linux/mman.h, since Linux 5.14; Python 3.11 has no name for it.
_MADV_POPULATE_READ = 22


class PayloadFile:
    """One open file.

    Args:
        choice: what was learned from other files.

    Raises:
        DatasetDamaged: it is missing.
    """

    def __init__(self, path: Path, choice: CopyChoice | None = None) -> None:
        self._path = path
        self._choice = choice or CopyChoice()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise damaged(path, str(error)) from error
        self._map: mmap.mmap | None = None
        self._mappable = True

    def copy(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on.

        Raises:
            DatasetDamaged: they are not all there.
        """
        if len(into) < MAPPED_BYTES_MIN:
            self.read(offset, into)
        else:
            self._choice.copy(len(into), lambda: self.read(offset, into), lambda: self.copy_mapped(offset, into))

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self._fd)

    def copy_mapped(self, offset: int, into: memoryview) -> bool:
        """As `copy`, from a mapping.

        False: not possible for this piece, and nothing was written that reading will not overwrite.
        """
        if self._map is None:
            if not self._mappable:
                return False
            try:
                self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
            except (OSError, ValueError):  # a file system without mappings; an empty file
                self._mappable = False
                return False
        first = offset // _PAGE * _PAGE
        stop = offset + len(into)
        if stop > len(self._map):
            return False
        try:
            self._map.madvise(_MADV_POPULATE_READ, first, stop - first)
        except OSError:  # EFAULT: a page cannot be had; EINVAL: a kernel that does not know this
            return False
        with memoryview(self._map) as mapped:
            into[:] = mapped[offset:stop]
        # The pages stay in the cache, but no longer count as this process's memory.
        first = max(0, first - _AROUND_BYTES)
        self._map.madvise(mmap.MADV_DONTNEED, first, stop + _AROUND_BYTES - first)
        return True

    def read(self, offset: int, into: memoryview) -> None:
        """As `copy`, by the kernel. A signal or a network file system may cut it short, and so does a file's end."""
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if count == 0:
                raise damaged(self._path, f"it ends before byte {offset + len(into)}")
            done += count


class PayloadFiles:
    """The files of a dataset by their path in it; the ones used last are kept open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._choice = CopyChoice()
        self._open: OrderedDict[str, PayloadFile] = OrderedDict()

    def __getitem__(self, path: str) -> PayloadFile:
        file = self._open.get(path)
        if file is not None:
            self._open.move_to_end(path)
            return file
        file = self._open[path] = PayloadFile(self._folder / path, self._choice)
        if len(self._open) > _OPEN_FILES_MAX:
            _, oldest = self._open.popitem(last=False)
            oldest.close()
        return file
