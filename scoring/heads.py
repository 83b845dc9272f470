"""LM heads on disk, to be read in pieces: a head that is being sent keeps no teacher in memory.

Derived data, by provenance; every read is held against the checksum that was taken when it was written.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crc32c import crc32c

from rollout_wal.dataset import Provenance

from .items import provenance_fields

_MAGIC = b"RWHEAD01"
#: magic, 1 if bfloat16 (else float32), rows, columns, CRC32C of the weights
_HEADER = struct.Struct("<8sIQQI")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A head [rows, columns], row-major, little-endian.

    Args:
        crc32c: of its bytes.
    """

    path: Path
    bfloat16: bool
    rows: int
    columns: int
    crc32c: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes. The reader compares the checksum at the end: a file can be damaged while it is read."""
        left = self.rows * self.columns * (2 if self.bfloat16 else 4)
        with self.path.open("rb") as file:
            file.seek(_HEADER.size)
            while left and (piece := file.read(min(left, _PIECE))):
                left -= len(piece)
                yield piece

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()


class HeadStore:
    """A folder of heads.

    Args:
        folder: created if need be; None: a temporary one, gone with the store.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._given, self._temporary = folder, ""

    @property
    def _folder(self) -> Path:
        if self._given is None and not self._temporary:  # when it is needed, which is rarely
            self._temporary = tempfile.mkdtemp(prefix="scoring-heads-")
            atexit.register(shutil.rmtree, self._temporary, ignore_errors=True)
        folder = self._given or Path(self._temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def get(self, provenance: Provenance) -> StoredHead | None:
        if self._given is None and not self._temporary:
            return None
        try:
            path = self._path(provenance)
            with path.open("rb") as file:
                raw, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
        except OSError:
            return None
        if len(raw) < _HEADER.size:
            return None
        magic, half, rows, columns, checksum = _HEADER.unpack(raw)
        if magic != _MAGIC or size != _HEADER.size + rows * columns * (2 if half else 4):
            return None
        return StoredHead(path, bool(half), rows, columns, checksum)

    def put(self, provenance: Provenance, head: Any) -> StoredHead:
        """Keep a head, a tensor of float32 or bfloat16 [rows, columns]. Raises OSError: it cannot be written."""
        import torch

        half = head.dtype == torch.bfloat16
        path = self._path(provenance)
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        checksum = 0
        try:
            with part.open("wb") as file:
                file.write(b"\0" * _HEADER.size)
                step = max(1, _PIECE // (head.shape[1] * 4))
                for start in range(0, head.shape[0], step):
                    rows = head[start : start + step].cpu().contiguous()
                    data = (rows.view(torch.int16) if half else rows.float()).numpy().tobytes()
                    checksum = crc32c(data, checksum)
                    file.write(data)
                file.seek(0)
                file.write(_HEADER.pack(_MAGIC, half, *head.shape, checksum))
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return StoredHead(path, half, head.shape[0], head.shape[1], checksum)

    def close(self) -> None:
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _path(self, provenance: Provenance) -> Path:
        digest = hashlib.blake2b(repr(provenance_fields(provenance)).encode(), digest_size=20).hexdigest()
        return self._folder / f"{digest}.head"
