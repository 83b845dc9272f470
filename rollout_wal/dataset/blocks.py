"""Blocks of payload files, each a record batch, from the page cache into place: read, or read and decompressed.

Uncompressed blocks are copied straight to where ranks will map them; compressed ones pass through one buffer, which is
used again for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from .inflate import HEAD_SLACK_BYTES, inflate
from .payload_files import PayloadFiles
from .reader import damaged

#: Compressed blocks up to this size share a buffer; a larger one gets its own, which is not kept.
_PACKED_BYTES = 4 << 20
#: Decompressing a byte takes as long as copying this many, roughly.
_INFLATE_COST = 8
_ARRAYS = ("file", "source", "bytes", "raw_bytes", "target")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one column group, each once, and where they go; `target` is relative to the extent. All int64 [N]."""

    paths: list[str]
    file: NDArray[np.int64]
    source: NDArray[np.int64]
    bytes: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]
    target: NDArray[np.int64]

    @property
    def cost_N(self) -> NDArray[np.int64]:
        """What it takes to move each block, in bytes copied."""
        return np.where(self.bytes == self.raw_bytes, self.raw_bytes, self.raw_bytes * _INFLATE_COST)

    def split(self, parts: int) -> list[Blocks]:
        """That many stretches of about equal cost. Neighbours in a file stay together."""
        cost_N = self.cost_N
        ends = np.cumsum(cost_N)
        total = int(cost_N.sum())
        # A block belongs to the part in which its middle lies.
        cuts = np.searchsorted(ends - cost_N // 2, [total * n // parts for n in range(1, parts)])
        edges = [0, *cuts.tolist(), len(ends)]
        return [
            Blocks(self.paths, *(getattr(self, name)[start:stop] for name in _ARRAYS))
            for start, stop in pairwise(edges)
        ]

    def pack(self) -> dict[str, Any]:
        """Plain types, with the paths that are needed only."""
        used, file = np.unique(self.file, return_inverse=True)
        arrays = {name: getattr(self, name).tobytes() for name in _ARRAYS[1:]}
        return {"paths": [self.paths[f] for f in used.tolist()], "file": file.astype(np.int64).tobytes(), **arrays}

    @classmethod
    def unpack(cls, raw: Mapping[str, Any]) -> Blocks:
        return cls(raw["paths"], *(np.frombuffer(raw[name], dtype=np.int64) for name in _ARRAYS))


class BlockReader:
    """Reads blocks of a dataset's files into memory.

    Args:
        folder: the dataset.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = PayloadFiles(folder)
        self._decompressor = zstandard.ZstdDecompressor()
        self._packed = memoryview(bytearray(_PACKED_BYTES))

    def read(self, blocks: Blocks, extent: memoryview) -> None:
        """Put every block where it belongs.

        Raises:
            DatasetDamaged: a file is missing, cut short, or holds no record batch where one should be.
        """
        columns = (blocks.file, blocks.source, blocks.bytes, blocks.raw_bytes, blocks.target)
        opened = -1
        for number, source, size, raw_size, target in zip(*(c.tolist() for c in columns), strict=True):
            if number != opened:
                file, opened = self._files[blocks.paths[number]], number
            # One that is not compressed goes straight to its place. (A compressed one of just this size, too: the rank
            # will decompress it.)
            if size == raw_size:
                file.copy(source, extent[target : target + size])
                continue
            packed = self._packed[:size] if size <= _PACKED_BYTES else memoryview(bytearray(size))
            file.copy(source, packed)
            try:
                inflate(packed, extent[target : target + raw_size + HEAD_SLACK_BYTES], self._decompressor)
            except (zstandard.ZstdError, ValueError) as error:
                raise damaged(self._folder / blocks.paths[number], f"record batch at {source}: {error}") from error
