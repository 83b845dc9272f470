"""What a model keeps per request, as a description: which parts grow with the tokens, and which are whole states.

Four kinds of layer. Grouped-query attention keeps keys and values of every token; multi-head latent attention (MLA)
one latent and one rotary vector of every token; a sliding window may keep only its last tokens; a recurrent layer
(SSM) keeps a state. What grows is cut into blocks; a window that forgets and a recurrent state belong to one position
and are kept whole, for that position.

Shape legend: H = heads, T = tokens, D = dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import KvError, problem

#: Bytes of an element. Arrays hold the bits as unsigned integers of this size: numpy knows neither bf16 nor fp8.
DTYPE_BYTES: Final = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
BITS: Final[dict[int, type[np.unsignedinteger[Any]]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True)
class TokenPart:
    """An array [H, T, D] that grows by one along T with every token."""

    heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class StatePart:
    """An array that is as large at every position, and other at each."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head, multi-query or grouped-query attention: keys and values of every token.

    `window`: the layer looks no further back, but its cache keeps everything all the same.
    """

    KIND: ClassVar = "attention"
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def tokens(self) -> tuple[TokenPart, ...]:
        return TokenPart(self.kv_heads, self.key_dim), TokenPart(self.kv_heads, self.value_dim)

    def states(self, dtype: str) -> tuple[StatePart, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Latent:
    """MLA: one compressed vector and one rotary key per token, shared by all heads."""

    KIND: ClassVar = "mla"
    latent_dim: int
    rotary_dim: int

    def tokens(self) -> tuple[TokenPart, ...]:
        return TokenPart(1, self.latent_dim), TokenPart(1, self.rotary_dim)

    def states(self, dtype: str) -> tuple[StatePart, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Window:
    """Sliding-window attention whose cache is a ring of the last `window` tokens: [H, window, D] at one position."""

    KIND: ClassVar = "window"
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int

    def tokens(self) -> tuple[TokenPart, ...]:
        return ()

    def states(self, dtype: str) -> tuple[StatePart, ...]:
        return (
            StatePart((self.kv_heads, self.window, self.key_dim), dtype),
            StatePart((self.kv_heads, self.window, self.value_dim), dtype),
        )


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A state-space or linear-attention layer: its states (convolution tail, recurrent matrix, ...) at one position."""

    KIND: ClassVar = "recurrent"
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"

    def tokens(self) -> tuple[TokenPart, ...]:
        return ()

    def states(self, dtype: str) -> tuple[StatePart, ...]:
        return tuple(StatePart(shape, self.dtype) for shape in self.shapes)


Layer = Attention | Latent | Window | Recurrent
_KINDS: Final[dict[str, type[Layer]]] = {kind.KIND: kind for kind in (Attention, Latent, Window, Recurrent)}


@dataclass(frozen=True)
class KvLayout:
    """All layers of a model's cache on one tensor-parallel rank."""

    dtype: str
    layers: tuple[Layer, ...]
    tp_rank: int = 0
    tp_size: int = 1
    packing: str = ""
    """How an engine packs the bytes, where it is not by token: what one engine saved, another must not load."""

    @cached_property
    def token_parts(self) -> tuple[TokenPart, ...]:
        return tuple(part for layer in self.layers for part in layer.tokens())

    @cached_property
    def state_parts(self) -> tuple[StatePart, ...]:
        return tuple(part for layer in self.layers for part in layer.states(self.dtype))

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def token_bytes(self) -> int:
        """What one token adds."""
        return self.itemsize * sum(part.heads * part.dim for part in self.token_parts)

    @cached_property
    def state_bytes(self) -> int:
        return sum(math.prod(part.shape) * DTYPE_BYTES[part.dtype] for part in self.state_parts)

    def describe(self) -> dict[str, Any]:
        """As plain data: what `parse` reads, and what keys are derived from."""
        return {
            "dtype": self.dtype,
            "layers": [{"kind": layer.KIND, **asdict(layer)} for layer in self.layers],
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
            **({"packing": self.packing} if self.packing else {}),
        }

    @classmethod
    def parse(cls, description: Mapping[str, Any]) -> KvLayout:
        """A layout from plain data, as an engine describes it.

        Raises:
            KvError: a kind of layer or a dtype that this version does not know, named.
        """
        try:
            dtype = description["dtype"]
            layers = [dict(layer) for layer in description["layers"]]
            kinds = [layer.pop("kind") for layer in layers]
            dtypes = {dtype, *(layer["dtype"] for layer in layers if "dtype" in layer)}
            if unknown := sorted({*(str(k) for k in kinds if k not in _KINDS), *map(str, dtypes - set(DTYPE_BYTES))}):
                raise _unknown(f"the KV layout names {unknown}, which this version does not know")
            for layer in layers:
                if "shapes" in layer:
                    layer["shapes"] = tuple(tuple(int(n) for n in shape) for shape in layer["shapes"])
            made = tuple(_KINDS[kind](**layer) for kind, layer in zip(kinds, layers, strict=True))
            ranks = int(description.get("tp_rank", 0)), int(description.get("tp_size", 1))
            return cls(dtype, made, *ranks, str(description.get("packing", "")))
        except (KeyError, TypeError, ValueError) as error:
            raise _unknown(f"the KV layout cannot be read: {type(error).__name__}: {error}") from error


def _unknown(what: str) -> KvError:
    return KvError(
        problem(
            what,
            consequence="No KV is saved or loaded; rollouts are resumed by prefill",
            remedy=f"Describe it with the kinds {sorted(_KINDS)} and the dtypes {sorted(DTYPE_BYTES)}",
        )
    )


@dataclass(frozen=True, slots=True)
class KvArrays:
    """The KV of one request up to a position, in an engine-neutral form: bits as unsigned integers.

    `parts` follow `KvLayout.token_parts`, each [H, T, D]; `states` follow `KvLayout.state_parts`.
    """

    token_T: NDArray[np.int32]
    """The tokens that it was computed over, from the first of the prompt."""
    parts: tuple[NDArray[Any], ...]
    states: tuple[NDArray[Any], ...] = ()

    def __len__(self) -> int:
        return len(self.token_T)

    def check(self, layout: KvLayout, *, room_for: int | None = None) -> None:
        """Whether these are arrays of this layout.

        Args:
            room_for: they are to be filled with so many tokens, and may be longer.

        Raises:
            KvMismatch: they are not; `reason` names what differs.
        """
        if len(self.parts) != len(layout.token_parts) or len(self.states) != len(layout.state_parts):
            raise KvMismatch(
                "layers",
                f"{len(self.parts)} arrays of tokens and {len(self.states)} states",
                f"{len(layout.token_parts)} and {len(layout.state_parts)}",
            )
        bits = np.dtype(BITS[layout.itemsize])
        for i, (array, part) in enumerate(zip(self.parts, layout.token_parts, strict=True)):
            what = f"array {i} of {array.dtype} {list(array.shape)}"
            wanted = f"{bits} [{part.heads}, {len(self) if room_for is None else f'at least {room_for}'}, {part.dim}]"
            if array.dtype != bits:
                raise KvMismatch("dtype", what, wanted)
            if array.ndim != 3 or array.shape[0] != part.heads:
                raise KvMismatch("heads", what, wanted)
            if array.shape[2] != part.dim:
                raise KvMismatch("head_dim", what, wanted)
            if array.shape[1] != len(self) if room_for is None else array.shape[1] < room_for:
                raise KvMismatch("tokens", what, wanted)
        for i, (array, state) in enumerate(zip(self.states, layout.state_parts, strict=True)):
            if (array.dtype, array.shape) != (np.dtype(BITS[DTYPE_BYTES[state.dtype]]), state.shape):
                raise KvMismatch(
                    "states", f"state {i} of {array.dtype} {list(array.shape)}", f"{state.dtype} {list(state.shape)}"
                )


class KvMismatch(KvError):
    """KV that is not of the layout it should have. `reason` is one word for metrics: what differs."""

    def __init__(self, reason: str, found: str, wanted: str) -> None:
        super().__init__(
            problem(
                f"KV does not fit ({reason}): {found} instead of {wanted}",
                consequence="It was not used; its tokens are computed again",
                remedy="See that whoever saves and loads it describes the same layout",
            )
        )
        self.reason = reason


def empty_arrays(layout: KvLayout, token_T: NDArray[np.int32], into: KvArrays | None = None) -> KvArrays:
    """Arrays to be filled, or the beginning of those in `into`. Nothing in them is defined yet.

    Raises:
        KvError: `into` has another layout, or no room for so many tokens.
    """
    bits = BITS[layout.itemsize]
    if into is not None:
        into.check(layout, room_for=len(token_T))
        return KvArrays(token_T, tuple(a[:, : len(token_T)] for a in into.parts), into.states)
    return KvArrays(
        token_T,
        tuple(np.empty((p.heads, len(token_T), p.dim), bits) for p in layout.token_parts),
        tuple(np.empty(p.shape, BITS[DTYPE_BYTES[p.dtype]]) for p in layout.state_parts),
    )


def pack_tokens(arrays: KvArrays, start: int, stop: int, out: NDArray[np.uint8]) -> None:
    """The bytes of tokens start..stop of every part, one part behind the other, into `out`, which is as large."""
    at = 0
    for array in arrays.parts:
        piece = array[:, start:stop]
        _as(out[at : at + piece.nbytes], piece)[...] = piece
        at += piece.nbytes


def unpack_tokens(raw: NDArray[np.uint8], arrays: KvArrays, start: int, stop: int) -> None:
    """The inverse of `pack_tokens`, into `arrays`."""
    at = 0
    for array in arrays.parts:
        piece = array[:, start:stop]
        piece[...] = _as(raw[at : at + piece.nbytes], piece)
        at += piece.nbytes


def _as(flat: NDArray[np.uint8], like: NDArray[Any]) -> NDArray[Any]:
    return flat.view(like.dtype).reshape(like.shape)


def pack_states(arrays: KvArrays) -> NDArray[np.uint8]:
    """The bytes of all whole states."""
    return np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.states])


def unpack_states(raw: NDArray[np.uint8], arrays: KvArrays) -> None:
    """The inverse of `pack_states`, into `arrays`."""
    at = 0
    for array in arrays.states:
        # A copy: states of several element sizes need not be aligned within the bytes.
        array[...] = np.frombuffer(raw[at : at + array.nbytes].tobytes(), array.dtype).reshape(array.shape)
        at += array.nbytes
