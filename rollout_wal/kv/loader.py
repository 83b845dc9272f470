"""Reads blocks into arrays: stretches of the files one ahead of the other, each verified before it is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import KvError
from .codec import Codec
from .data_files import KvDamage
from .finder import Piece
from .format import Header, Kind
from .layout import KvArrays, KvLayout, unpack_states, unpack_tokens
from .memory import Buffers
from .reader import DataReader, check, decoded, record

#: Blocks that stand one behind the other are read at once, up to so many bytes (or one block).
_EXTENT_BYTES: Final = 8 << 20
#: Extents that are being read while another is unpacked.
_READING_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class Damage:
    """Why loading ended. `lost`: the block is of no use to anybody."""

    piece: Piece
    reason: str
    detail: str
    lost: bool


@dataclass(frozen=True, slots=True)
class _Extent:
    """Blocks that are neighbours in one file."""

    pieces: tuple[Piece, ...]
    length: int


Unpack = Callable[[], None]
#: What reading came to, block by block: how it is unpacked, or why it cannot be.
_Outcome = list[Unpack | Exception]


class Loader:
    """See the module. Thread-safe.

    Args:
        io: threads that read; they decompress too.
    """

    def __init__(self, reader: DataReader, io: Executor) -> None:
        self._reader = reader
        self._io = io
        self._buffers = Buffers(_READING_MAX + 1)

    def load(self, pieces: list[Piece], arrays: KvArrays, layout: KvLayout) -> tuple[int, Damage | None]:
        """Fill `arrays`. Returns how many leading tokens are good, and the first damage."""
        todo = deque(_extents(pieces))
        reading: deque[tuple[_Extent, Future[tuple[NDArray[np.uint8] | None, _Outcome]]]] = deque()
        good, damage = 0, None
        while reading or (todo and damage is None):
            while todo and damage is None and len(reading) < _READING_MAX:
                extent = todo.popleft()
                reading.append((extent, self._io.submit(self._read, extent, arrays, layout)))
            extent, future = reading.popleft()
            buffer, outcome = future.result()  # waited for in any case: nobody may still write into the arrays
            for piece, done in zip(extent.pieces, outcome):
                if damage is None:
                    try:
                        if isinstance(done, Exception):
                            raise done
                        done()
                        good = piece.stop
                    except KvDamage as error:
                        damage = Damage(piece, error.reason, str(error), lost=True)
                    except FileNotFoundError as error:
                        damage = Damage(piece, "missing", str(error), lost=True)
                    except (OSError, ValueError, KvError) as error:
                        damage = Damage(piece, "unreadable", str(error), lost=False)
            if buffer is not None:
                self._buffers.give(buffer)
        return good, damage

    def _read(self, extent: _Extent, arrays: KvArrays, layout: KvLayout) -> tuple[NDArray[np.uint8] | None, _Outcome]:
        """Read an extent. What is compressed is unpacked here, side by side; what is not, where it costs little, by
        the caller. Never raises."""
        first = extent.pieces[0].place
        buffer = None
        try:
            size = self._reader.readable(replace(first, length=extent.length))
            buffer = self._buffers.take(size)
            data = buffer.data[: self._reader.fetch(first.file_id, first.offset, buffer[:size])]
        except Exception as error:
            return buffer, [error] * len(extent.pieces)
        outcome: _Outcome = []
        for piece in extent.pieces:
            at = piece.place.offset - first.offset
            try:
                header, stored = record(data[at : at + piece.place.length], piece.place, piece.key, piece.kind)
                unpack: Unpack = partial(_unpack, piece, header, stored, arrays, layout)
                if header.codec != Codec.RAW:
                    unpack()
                    unpack = _nothing
                outcome.append(unpack)
            except Exception as error:
                outcome.append(error)
        return buffer, outcome


def _unpack(piece: Piece, header: Header, stored: memoryview, arrays: KvArrays, layout: KvLayout) -> None:
    """Verify a block and copy it to where it belongs. Raises KvDamage."""
    wanted = layout.state_bytes if piece.kind is Kind.STATE else (piece.stop - piece.start) * layout.token_bytes
    if header.raw_bytes != wanted or (piece.kind is Kind.TOKENS and header.tokens != piece.stop - piece.start):
        raise KvDamage("mismatch", piece.place, f"{header.raw_bytes} bytes where the layout has {wanted}")
    check(header, stored, piece.place)
    raw = decoded(header, stored, piece.place)
    if piece.kind is Kind.STATE:
        unpack_states(raw, arrays)
    else:
        unpack_tokens(raw, arrays, piece.start, piece.stop)


def _nothing() -> None:
    """It has been unpacked already."""


def _extents(pieces: list[Piece]) -> Iterator[_Extent]:
    waiting: list[Piece] = []
    for piece in pieces:
        if waiting:
            first, last = waiting[0].place, waiting[-1].place
            follows = (piece.place.file_id, piece.place.offset) == (last.file_id, last.offset + last.length)
            if not follows or piece.place.offset + piece.place.length - first.offset > _EXTENT_BYTES:
                yield _extent(waiting)
                waiting = []
        waiting.append(piece)
    if waiting:
        yield _extent(waiting)


def _extent(pieces: list[Piece]) -> _Extent:
    first, last = pieces[0].place, pieces[-1].place
    return _Extent(tuple(pieces), last.offset + last.length - first.offset)
