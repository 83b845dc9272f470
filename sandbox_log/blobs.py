"""Large bytes, kept once each under the digest of their content, compressed.

A blob is durable before the event that refers to it is even handed to the log, so a reference in the log always has
its blob. The other way round a crash can leave a blob that nothing refers to; `collect` removes those.

    blobs/3f/3f2a...e1.zst      BLAKE2b-256 of the uncompressed bytes, in hex
    blobs/tmp/                  written here, synced, then renamed
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from .directories import sync_directory
from .errors import LogDamaged, problem
from .events import BlobRef, digest_of
from .poison import Poison

#: No blob is ever larger than this once decompressed. A log that claims otherwise is refused unread.
BLOB_BYTES_MAX = 1 << 32
_CHUNK_BYTES = 1 << 20


class NotOpened(Exception):
    """No file can be opened just now: too many are open, or the kernel has no memory. This says nothing of the disk."""


class BlobStore:
    """Content-addressed files under one directory. Safe for many threads and processes at once.

    Args:
        directory: created where `create` is true.
        poison: of the log that this is a part of.
        level: of zstandard. 1 is near the speed of the disk.
    """

    def __init__(self, directory: Path, *, create: bool, poison: Poison, level: int = 1) -> None:
        self.directory = directory
        self._poison = poison
        self._level = level
        self._shards: set[Path] = set()
        self._syncing: dict[Path, threading.Lock] = {}
        if create:
            (directory / "tmp").mkdir(parents=True, exist_ok=True)
            sync_directory(directory)  # whoever made it may not have come to that yet
            sync_directory(directory.parent)

    def put(self, data: bytes) -> BlobRef:
        """Store `data`; durable when this returns.

        Raises:
            LogPoisoned: the disk refused, now or earlier. Nothing that refers to the blob may be logged.
            NotOpened: not now. Nothing that refers to the blob may be logged; anything else may.
        """
        self._poison.check()
        ref = BlobRef(digest=digest_of(data), size=len(data))
        try:
            self._put(self._path(ref.digest), data)
        except OSError as error:
            raise self._failed(error) from error
        return ref

    def _put(self, path: Path, data: bytes) -> None:
        if path.parent not in self._shards:
            path.parent.mkdir(exist_ok=True)
            self._sync(self.directory)  # whoever made it may not have come to that yet
            self._shards.add(path.parent)
        if path.exists():
            # Whoever put it may not have synced the directory yet, and may die before it does.
            self._sync(path.parent)
            return
        temporary = self.directory / "tmp" / secrets.token_hex(16)
        try:
            with _create(temporary) as file:
                file.write(zstandard.ZstdCompressor(level=self._level).compress(data))
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._sync(path.parent)

    def _sync(self, directory: Path) -> None:
        """Make the names in a directory durable. One thread at a time: a sync that failed is reported once, and who
        asked right after it would hear that all is well."""
        with self._syncing.setdefault(directory, threading.Lock()):
            self._poison.check()
            try:
                sync_directory(directory)
            except OSError as error:
                raise self._failed(error) from error

    def _failed(self, error: OSError) -> Exception:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # which no write and no sync reports
            return NotOpened(str(error))
        return self._poison.spread(error)

    def get(self, ref: BlobRef) -> bytes:
        """The bytes of a blob, checked. Never allocates more than `ref.size` says.

        Raises:
            LogDamaged: it is missing, longer or shorter than `ref` says, or has another digest.
        """
        path = self._path(ref.digest)
        if ref.size > BLOB_BYTES_MAX:
            raise _damaged(path, f"{ref.size} bytes are claimed, more than {BLOB_BYTES_MAX}")
        data = bytearray()
        try:
            with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                while len(data) <= ref.size:
                    # One byte more than is claimed, so that a longer blob is noticed without reading it all.
                    chunk = reader.read(min(_CHUNK_BYTES, ref.size + 1 - len(data)))
                    if not chunk:
                        break
                    data += chunk
        except FileNotFoundError as error:
            raise _damaged(path, "the file is missing") from error
        except zstandard.ZstdError as error:
            raise _damaged(path, str(error)) from error
        if len(data) != ref.size:
            raise _damaged(path, f"it holds {'more' if len(data) > ref.size else 'fewer'} than {ref.size} bytes")
        whole = bytes(data)
        if digest_of(whole) != ref.digest:
            raise _damaged(path, "its content has another digest")
        return whole

    def digests(self) -> Iterator[tuple[bytes, Path]]:
        """Every blob that is there."""
        for path in self.directory.glob("[0-9a-f][0-9a-f]/*.zst"):
            yield bytes.fromhex(path.name.removesuffix(".zst")), path

    def collect(self, referred: Collection[bytes]) -> tuple[int, int]:
        """Remove every blob whose digest is not in `referred`, and whatever a crash left half written.

        Nobody may be writing meanwhile; `SandboxLog.collect` sees to that.

        Returns:
            how many files were removed, and how many bytes of disk they held.
        """
        orphans = [path for digest, path in self.digests() if digest not in referred]
        orphans += (self.directory / "tmp").iterdir()
        total = sum(path.stat().st_size for path in orphans)
        for path in orphans:
            path.unlink()
        return len(orphans), total

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.directory / name[:2] / f"{name}.zst"


def _create(path: Path) -> BinaryIO:
    try:
        return open(path, "xb")
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise NotOpened(str(error)) from error
        raise


def _damaged(path: Path, why: str) -> LogDamaged:
    return LogDamaged(
        problem(
            f"blob {path}: {why}",
            consequence="An output or argument that the log refers to cannot be read back",
            remedy="Restore the file from a copy of the log; the rest of the log is not affected",
        )
    )
