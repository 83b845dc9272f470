"""Routes of mixture-of-experts models: which experts each token went through, as named columns of the steps.

The row of a sampled token is that of the forward pass that predicted it: of the token before it. So a rollout of n
tokens has n rows, and the rest of its prompt has none here. A column of a step is at most 255 wide, so a row of L
layers with K experts each is cut into columns 16, 17, ...; the engine record says `"routes": [L, K]`.

Shape legend: N = tokens of a step, T = tokens of a stream, L = layers, K = experts of a token in a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...step import FIRST_NAMED_COLUMN
from ...stream import Stream

_WIDTH_MAX: Final = 255
INFO: Final = "routes"
"""Key of the shape (L, K) in an engine record."""


@dataclass(frozen=True, slots=True)
class Routes:
    """Expert ids. What is missing is masked."""

    value_T: NDArray[np.unsignedinteger[Any]]
    """[T, L, K], uint8 or uint16."""
    valid_T: NDArray[np.bool_]

    def __getitem__(self, at: slice) -> Routes:
        return Routes(self.value_T[at], self.valid_T[at])

    @classmethod
    def concat(cls, parts: list[Routes]) -> Routes:
        return cls(np.concatenate([p.value_T for p in parts]), np.concatenate([p.valid_T for p in parts]))


def columns_of(route_N: NDArray[Any]) -> dict[int, NDArray[Any]]:
    """The named columns of a step, of routes [N, L, K]."""
    flat = route_N.reshape(len(route_N), -1)
    cuts = range(0, flat.shape[1], _WIDTH_MAX)
    return {FIRST_NAMED_COLUMN + i: np.ascontiguousarray(flat[:, at : at + _WIDTH_MAX]) for i, at in enumerate(cuts)}


def shape_of(engine: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(L, K) of an engine record; None: its engine logs no routes."""
    found = (engine or {}).get(INFO)
    return None if found is None else (int(found[0]), int(found[1]))


def routes_of(stream: Stream, shape: tuple[int, int]) -> Routes:
    """What a stream holds of routes."""
    width = shape[0] * shape[1]
    count = -(-width // _WIDTH_MAX)
    parts = [stream.named.get(FIRST_NAMED_COLUMN + i, []) for i in range(count)]
    dtype = next((values.dtype for entries in parts for _, values in entries), np.dtype(np.uint8))
    flat_T = np.zeros((stream.length, width), dtype)
    covered_T = np.zeros(stream.length, np.int64)
    for i, entries in enumerate(parts):
        at = i * _WIDTH_MAX
        wide = min(_WIDTH_MAX, width - at)
        for first, values in entries:
            flat_T[first : first + len(values), at : at + wide] = values.reshape(len(values), wide)
            covered_T[first : first + len(values)] += 1
    return Routes(flat_T.reshape(stream.length, *shape), covered_T == count)
