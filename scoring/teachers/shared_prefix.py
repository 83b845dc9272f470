"""Rows that go on after one context, without a copy of that context for each row.

transformers lets a model's attention be replaced by name. While a batch with a shared context is forwarded, the model
attends through `_attend`: each row's own keys and values are written behind the context's, into one buffer that all
rows use in turn, and torch's own scaled_dot_product_attention reads it there. Queries, masks, scaling and the order of
keys are those of a plain forward; grouped queries read their heads' keys in place. What is spared is the context's
keys and values times the number of rows, in memory and in traffic.

Nothing is assumed of an architecture. What this module cannot be sure of raises CannotShare, and the caller copies the
context instead: layers with another memory than keys and values, attention that is not torch's (soft caps, sinks,
biases), layers that read another layer's keys, masks of another shape, and models in which some layer went round it.

Shape legend: N = rows, L = new tokens of each, P = context tokens that a layer still holds, K = keys that a layer's new
tokens may see, H = query heads, G = query heads of a key head, D = head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

_NAME = "scoring_shared_prefix"
#: Options of an attention that change what it computes, and that are not computed here.
_FOREIGN = ("softcap", "s_aux", "position_bias", "cache", "head_mask", "sinks")


class CannotShare(Exception):
    """The model does something that only a plain forward does right."""


class SharedPrefix:
    """A context's keys and values, to be continued by many rows.

    Args:
        prefix: the cache after the context was forwarded, one row.

    Raises:
        CannotShare: the model keeps something else than keys and values.
    """

    def __init__(self, prefix: DynamicCache) -> None:
        if type(prefix) is not DynamicCache:
            raise CannotShare(f"its cache is a {type(prefix).__name__}")
        for layer in prefix.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
                raise CannotShare(f"a layer of its cache is a {layer!r}")
        self._buffers = [_Buffer(layer) for layer in prefix.layers]

    def rows(self, width: int) -> RowCache:
        """A cache for rows that go on after the context, of `width` tokens at most."""
        for buffer in self._buffers:
            buffer.reserve(width)
        return RowCache([_RowLayer(buffer) for buffer in self._buffers])


class RowCache(Cache):
    """What a model takes as its cache while rows are forwarded behind a shared context."""

    def __init__(self, layers: list[_RowLayer]) -> None:
        super().__init__(layers=layers)
        self.rows = layers

    @contextlib.contextmanager
    def attending(self, config: Any) -> Iterator[None]:
        """A forward with this cache, of the model whose layers have this configuration, belongs in here.

        Raises:
            CannotShare: at the end too, if a layer did not attend through here: then what was computed is wrong.
        """
        before = config._attn_implementation
        if before != "sdpa":
            raise CannotShare(f"its attention is {before!r}")
        for layer in self.rows:
            layer.attended = 0
        token = _current.set(self)
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            _current.reset(token)
        if any(layer.attended != 1 for layer in self.rows):
            raise CannotShare(f"its layers attended {[layer.attended for layer in self.rows]} times")


_current: ContextVar[RowCache | None] = ContextVar("scoring_shared_prefix", default=None)


class _Buffer:
    """Keys and values of one layer's context, with room behind them for one row."""

    def __init__(self, layer: DynamicLayer) -> None:
        assert layer.keys is not None
        assert layer.values is not None
        self.tokens: int = layer.get_seq_length()  # of the context, those that a window has left behind included
        self.held: int = layer.keys.shape[2]
        self.window: int | None = getattr(layer, "sliding_window", None)
        self.keys, self.values = layer.keys, layer.values
        self._layer = layer

    def reserve(self, width: int) -> None:
        if self.keys.shape[2] < self.held + width:
            self.keys, self.values = (_longer(x, self.held, width) for x in (self.keys, self.values))
            self._layer.keys, self._layer.values = (x[:, :, : self.held] for x in (self.keys, self.values))


def _longer(held_1HPD: Tensor, held: int, width: int) -> Tensor:
    out = held_1HPD.new_empty(*held_1HPD.shape[:2], held + width, held_1HPD.shape[3])
    out[:, :, :held] = held_1HPD[:, :, :held]
    return out


class _RowLayer(CacheLayerMixin):
    """One layer's cache of the rows: their own keys and values, without the context's."""

    is_sliding = False

    def __init__(self, buffer: _Buffer) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.buffer, self.is_sliding = buffer, buffer.window is not None
        self.is_initialized = True
        self.new: tuple[Tensor, Tensor] | None = None
        """What this layer stored last: what it must attend to next, and no other layer."""
        self.attended = 0
        self._first = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._first = self.get_mask_sizes(key_states.shape[2])[1] - (self.buffer.tokens - self.buffer.held)
        self.keys = key_states if self.keys is None else torch.cat((self.keys, key_states), 2)
        self.values = value_states if self.values is None else torch.cat((self.values, value_states), 2)
        self.new = key_states, value_states
        return self.new

    def get_seq_length(self) -> int:
        return self.buffer.tokens + (0 if self.keys is None else self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next tokens may see, and the position of the first of them."""
        end = self.get_seq_length()
        first = self.buffer.tokens - self.buffer.held
        if self.buffer.window is not None:
            first = max(first, end - self.buffer.window + 1)
        return end + query_length - first, first

    def get_max_length(self) -> int:
        return -1

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H / G, K, D] that the row's new tokens may see. Valid until the next row is asked for."""
        assert self.keys is not None
        assert self.values is not None
        buffer, end = self.buffer, self.buffer.held + self.keys.shape[2]
        buffer.keys[0, :, buffer.held : end] = self.keys[row]
        buffer.values[0, :, buffer.held : end] = self.values[row]
        return buffer.keys[0, :, self._first : end], buffer.values[0, :, self._first : end]


def _attend(
    module: torch.nn.Module,
    query_NHLD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' sdpa_attention_forward, for rows behind a shared context; [N, L, H, D]."""
    cache, index = _current.get(), getattr(module, "layer_idx", None)
    layer = None if cache is None or index is None else cache.rows[index]
    if layer is None or layer.new is None or key is not layer.new[0] or value is not layer.new[1]:
        raise CannotShare(f"{type(module).__name__} attends to other keys than it stored")
    if foreign := [name for name in _FOREIGN if kwargs.get(name) is not None]:
        raise CannotShare(f"{type(module).__name__} attends with {', '.join(foreign)}")
    n, heads, length, _ = query_NHLD.shape
    assert layer.keys is not None
    seen = layer.buffer.held + layer.keys.shape[2] - layer._first
    if (attention_mask is None and length > 1) or dropout:
        raise CannotShare(f"{type(module).__name__} attends without a mask")
    if attention_mask is not None and tuple(attention_mask.shape) not in {(n, 1, length, seen), (1, 1, length, seen)}:
        raise CannotShare(f"{type(module).__name__} attends with a mask {list(attention_mask.shape)}")
    key_heads = key.shape[1]
    out = query_NHLD.new_empty(n, length, heads, value.shape[3])
    for row in range(n):
        keys, values = (x[:, None].expand(-1, heads // key_heads, -1, -1) for x in layer.of_row(row))
        mask = None if attention_mask is None else attention_mask[row if len(attention_mask) > 1 else 0, 0]
        query = query_NHLD[row].view(key_heads, heads // key_heads, length, -1)
        found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        out[row] = found.flatten(0, 1).transpose(0, 1)
    layer.attended += 1
    return out, None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
