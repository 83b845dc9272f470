"""Where the keys and values of running requests live.

A request's KV is one contiguous row that doubles when it is full: rows of one capacity share an arena, and a request
that outgrows its row moves to the next arena. So each arena's rows can be attended over as one batch, as a view and
without copying, while padding never exceeds a factor of two.

An arena's rows stay dense: a released row is filled with the last one.

Shape legend: R = rows of an arena, K = KV heads, T = tokens, D = head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kv.layout import KvLayout, KvMismatch

#: Capacity of the smallest row, in tokens. Below it, moving rows costs more than their padding.
SMALLEST_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class RequestKv:
    """The KV of one request, detached from the engine: what a snapshot saves and `HFEngine.add` takes back.

    `layers` holds (keys, values) per layer, each [K, T, D], of the first `tokens` tokens of prompt + prefix.
    Keys are as the model cached them: already rotated.
    """

    tokens: int
    layers: tuple[tuple[Tensor, Tensor], ...]


class KvArena:
    """Rows of one capacity, for all layers. Row r of every layer belongs to the request `owners[r]`."""

    def __init__(self, capacity: int, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self._device, self._dtype = device, dtype
        self.owners: list[int] = []
        # Per layer [R, K, T, D], made when the layer first writes: only then is its shape known.
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._rows = 0

    def allocate(self, owner: int) -> int:
        """A row of zeros. Stale NaN from a former owner would pass through masked positions as 0 * NaN."""
        row = len(self.owners)
        self.owners.append(owner)
        if row >= self._rows:
            self._rows = max(4, 2 * self._rows)
            for buffers in (self._keys, self._values):
                buffers[:] = [None if old is None else _with_rows(old, self._rows) for old in buffers]
        else:
            for buffer in (*self._keys, *self._values):
                if buffer is not None:
                    buffer[row].zero_()
        return row

    def release(self, row: int) -> int | None:
        """Give the row up. Returns the owner that moved into it, if any."""
        last = self.owners.pop()
        if row == len(self.owners):
            return None
        for buffer in (*self._keys, *self._values):
            if buffer is not None:
                buffer[row] = buffer[len(self.owners)]
        self.owners[row] = last
        return last

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, [R, K, T, D]; made like `keys` and `values` ([K, ..., D]) at first use."""
        k, v = self._keys[index], self._values[index]
        if k is None or v is None:
            k, v = self._zeros(keys), self._zeros(values)
            self._keys[index], self._values[index] = k, v
        return k, v

    def _zeros(self, like: Tensor) -> Tensor:
        shape = (self._rows, like.shape[0], self.capacity, like.shape[-1])
        return torch.zeros(shape, device=self._device, dtype=self._dtype)

    def read(self, row: int, tokens: int) -> list[tuple[Tensor, Tensor] | None]:
        """Views of a row's first tokens, per layer; None for layers that have not written yet."""
        return [
            None if k is None or v is None else (k[row, :, :tokens], v[row, :, :tokens])
            for k, v in zip(self._keys, self._values, strict=True)
        ]

    def write(self, row: int, layers: list[tuple[Tensor, Tensor] | None]) -> None:
        """The inverse of `read`, into the row's first tokens."""
        for index, pair in enumerate(layers):
            if pair is not None:
                k, v = self.layer(index, *pair)
                k[row, :, : pair[0].shape[1]] = pair[0]
                v[row, :, : pair[1].shape[1]] = pair[1]


class KvCache:
    """All arenas, and where each owner's row is. Owners are small integers below `owners_max`."""

    def __init__(self, layers: int, owners_max: int, device: torch.device, dtype: torch.dtype) -> None:
        self._layers, self._device, self._dtype = layers, device, dtype
        self.arenas: list[KvArena] = []
        self.arena_N = np.full(owners_max, -1, dtype=np.int64)
        """Index into `arenas` per owner; -1 where it has no row."""
        self.row_N = np.zeros(owners_max, dtype=np.int64)
        self.capacity_N = np.zeros(owners_max, dtype=np.int64)

    def reserve(self, owner: int, tokens: int) -> None:
        """Room for that many tokens of an owner; what it holds already is kept."""
        if tokens <= self.capacity_N[owner]:
            return
        index = 0
        while SMALLEST_CAPACITY << index < tokens:
            index += 1
        while len(self.arenas) <= index:
            capacity = SMALLEST_CAPACITY << len(self.arenas)
            self.arenas.append(KvArena(capacity, self._layers, self._device, self._dtype))
        row = self.arenas[index].allocate(owner)
        old = int(self.arena_N[owner])
        if old >= 0:
            arena = self.arenas[old]
            self.arenas[index].write(row, arena.read(int(self.row_N[owner]), arena.capacity))
            self.release(owner)
        self.arena_N[owner], self.row_N[owner] = index, row
        self.capacity_N[owner] = self.arenas[index].capacity

    def release(self, owner: int) -> None:
        """Give an owner's row up; nothing if it has none."""
        index = int(self.arena_N[owner])
        if index < 0:
            return
        row = int(self.row_N[owner])
        moved = self.arenas[index].release(row)
        if moved is not None:
            self.row_N[moved] = row
        self.arena_N[owner], self.capacity_N[owner] = -1, 0

    def export(self, owner: int, tokens: int) -> RequestKv:
        """A copy of the KV of an owner's first tokens; no layers if it has computed none."""
        index = int(self.arena_N[owner])
        if index < 0 or tokens == 0:
            return RequestKv(0, ())
        pairs = self.arenas[index].read(int(self.row_N[owner]), tokens)
        return RequestKv(tokens, tuple((pair[0].clone(), pair[1].clone()) for pair in pairs if pair is not None))

    def check(self, kv: RequestKv, layout: KvLayout) -> None:
        """Whether `restore` can take this: copying would silently convert another dtype.

        Raises:
            KvMismatch: not one pair per layer, or tensors of another dtype or shape; `reason` names it.
        """
        if len(kv.layers) != self._layers:
            raise KvMismatch("layers", f"{len(kv.layers)} layers", f"{self._layers}")
        parts = iter(layout.token_parts)
        for index, pair in enumerate(kv.layers):
            for tensor, name in zip(pair, ("keys", "values"), strict=True):
                part = next(parts)
                found = f"{name} of layer {index}, {tensor.dtype} {list(tensor.shape)}"
                wanted = f"{self._dtype} [{part.heads}, {kv.tokens}, {part.dim}]"
                if tensor.dtype != self._dtype:
                    raise KvMismatch("dtype", found, wanted)
                if tensor.ndim != 3 or tensor.shape[0] != part.heads:
                    raise KvMismatch("heads", found, wanted)
                if tensor.shape[1] != kv.tokens:
                    raise KvMismatch("tokens", found, wanted)
                if tensor.shape[2] != part.dim:
                    raise KvMismatch("head_dim", found, wanted)

    def restore(self, owner: int, kv: RequestKv) -> None:
        """Fill an owner's row from exported KV that passed `check`."""
        self.reserve(owner, kv.tokens)
        self.arenas[int(self.arena_N[owner])].write(int(self.row_N[owner]), list(kv.layers))


def _with_rows(buffer: Tensor, rows: int) -> Tensor:
    grown = buffer.new_zeros((rows, *buffer.shape[1:]))
    grown[: buffer.shape[0]] = buffer
    return grown
