"""Finds the blocks of the longest saved beginning of a token sequence, by the index alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .data_files import Place
from .format import Kind
from .hashing import Chain, Run, state_key
from .index import Index


@dataclass(frozen=True, slots=True)
class Piece:
    """A block to be read: tokens start..stop, or the states at `stop`."""

    key: bytes
    place: Place
    kind: Kind
    start: int
    stop: int


def find(index: Index, token_T: NDArray[np.int32], chain: Chain, runs: Sequence[Run]) -> list[Piece]:
    """The blocks of the longest beginning that is indexed, in order. Raises lmdb.Error."""
    size, total = chain.block_tokens, len(token_T)
    parents = [chain.root(), *chain.keys(token_T, runs)]
    if chain.layout.state_parts:
        return _find_state(index, token_T, chain, runs, parents)
    pieces = _whole_blocks(index, parents, size)
    start = len(pieces) * size
    longest = min(size - 1, total - start)
    # The partial block at the end may have any length: the longest that is there.
    partial = (
        (stop, chain.key(parents[len(pieces)], token_T, start, stop, runs))
        for stop in range(start + longest, start, -1)
    )
    for stop, key in partial:
        (place,) = index.find([key])
        if place is not None:
            pieces.append(Piece(key, place, Kind.TOKENS, start, stop))
            break
    return pieces


def _whole_blocks(index: Index, parents: list[bytes], size: int) -> list[Piece]:
    pieces: list[Piece] = []
    for i, place in enumerate(index.find(parents[1:])):
        if place is None:
            break
        pieces.append(Piece(parents[i + 1], place, Kind.TOKENS, i * size, (i + 1) * size))
    return pieces


def _find_state(
    index: Index, token_T: NDArray[np.int32], chain: Chain, runs: Sequence[Run], parents: list[bytes]
) -> list[Piece]:
    """Whole states exist at few positions: the last of them that all its token blocks lead up to."""
    size = chain.block_tokens
    blocks = _whole_blocks(index, parents, size) if chain.layout.token_bytes else []
    reach = len(blocks) if chain.layout.token_bytes else len(parents) - 1
    for n in range(reach, -1, -1):
        start = n * size
        ends = [
            (stop, chain.key(parents[n], token_T, start, stop, runs))
            for stop in range(min(start + size - 1, len(token_T)), start, -1)
        ]
        if n:
            ends.append((start, parents[n]))
        states = list(index.find(state_key(end) for _, end in ends))
        tokens = list(index.find(end for _, end in ends))
        for (stop, end), state, block in zip(ends, states, tokens, strict=True):
            if state is None:
                continue
            pieces = blocks[:n]
            if stop > start and chain.layout.token_bytes:
                if block is None:
                    continue
                pieces.append(Piece(end, block, Kind.TOKENS, start, stop))
            return [*pieces, Piece(state_key(end), state, Kind.STATE, stop, stop)]
    return []
