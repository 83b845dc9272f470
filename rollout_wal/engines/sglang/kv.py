"""KV out of SGLang's cache and back into it, for one scheduler in this process.

Out: the rows of a request's tokens, by SGLang's own table. In: as if another request had computed them: rows are
allocated, filled, and entered into the radix cache under their tokens, where the request that follows finds them.

Shape legend: H = KV heads, T = tokens, D = head dimension.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from torch import Tensor

from ...errors import KvError, problem
from ...kv.layout import BITS, DTYPE_BYTES, KvArrays, KvLayout


class SchedulerKv:
    """The KV pool and the radix cache of a scheduler.

    Raises:
        KvError: a cache that is not plain keys and values of attention in one pool.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._allocator = scheduler.token_to_kv_pool_allocator
        pool = self._allocator.get_kvcache()
        dtype = str(getattr(pool, "dtype", None)).removeprefix("torch.")
        tree = type(scheduler.tree_cache)
        plain = type(pool) is MHATokenToKVPool and tree is UnifiedRadixCache and not scheduler.disable_radix_cache
        if not plain or dtype not in DTYPE_BYTES:
            raise KvError(
                problem(
                    f"SGLang keeps KV in a {type(pool).__name__} of {dtype}, its prefix cache is a {tree.__name__}, "
                    f"turned {'off' if scheduler.disable_radix_cache else 'on'}",
                    consequence="KV is neither saved nor loaded; rollouts are resumed by prefill",
                    remedy="Use a model with plain attention, an unquantised KV cache, and the radix cache",
                )
            )
        self._page: int = scheduler.page_size
        self._layers = range(pool.layer_num)
        self._pool = pool
        self.layout = KvLayout.parse(
            {
                "dtype": dtype,
                "layers": [
                    {
                        "kind": "attention",
                        "kv_heads": int(pool.get_key_buffer(i).shape[1]),
                        "key_dim": int(pool.get_key_buffer(i).shape[2]),
                        "value_dim": int(pool.get_value_buffer(i).shape[2]),
                    }
                    for i in self._layers
                ],
            }
        )

    def tokens(self, req: Any) -> int:
        """Leading tokens of a request whose KV is there."""
        length = len(req.origin_input_ids) + len(req.output_ids)
        return min(int(req.kv.kv_committed_len), length - 1) if req.kv.holds_kv else 0

    def bytes_of(self, req: Any) -> int:
        """Bytes that `save` would copy."""
        per_token = sum(buffer[:1].nbytes for buffer in self._buffers())
        return self.tokens(req) * per_token

    def whole(self, count: int) -> int:
        """Of so many tokens, those that fill pages: the radix cache has no others."""
        return count - count % self._page

    def cached(self, token_T: NDArray[np.int32]) -> int:
        """How many leading tokens the radix cache has."""
        key = RadixKey(array("q", token_T.astype(np.int64).tobytes()))
        return int(self._scheduler.tree_cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len)

    def room(self) -> int:
        """Tokens for which there is memory, or that nobody runs with."""
        return int(self._allocator.available_size() + self._scheduler.tree_cache.evictable_size())

    def save(self, req: Any) -> KvArrays | None:
        """A copy of what is computed of a request; None if nothing is."""
        count = self.tokens(req)
        if not count:
            return None
        rows = self._scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :count].long()
        parts = [_bits(buffer[rows].transpose(0, 1)) for buffer in self._buffers()]
        token_T = np.array([*req.origin_input_ids, *req.output_ids][:count], np.int32)
        return KvArrays(token_T, tuple(parts), ())

    def restore(self, kv: KvArrays) -> int:
        """Put KV where the radix cache finds it. Returns how many leading tokens are there now.

        Fewer than are given where memory is short or a page would be cut: the rest is prefilled.
        """
        count = self.whole(len(kv))
        if not count:
            return 0
        tree = self._scheduler.tree_cache
        evict_from_tree_cache(tree, count)
        rows = self._allocator.alloc(count)
        if rows is None:
            return 0
        rows = rows.long()
        with torch.no_grad():
            for buffer, part in zip(self._buffers(), kv.parts, strict=True):
                buffer[rows] = _tensor(part[:, :count], buffer.dtype).transpose(0, 1).to(buffer.device)
        tokens = array("q", kv.token_T[:count].astype(np.int64).tobytes())
        # Where another request has computed the beginning already, the tree keeps its rows, and frees ours.
        tree.insert(InsertParams(key=RadixKey(tokens), value=rows))
        return count

    def _buffers(self) -> Iterator[Tensor]:
        """Keys and values of each layer, [rows of the pool, H, D]."""
        for i in self._layers:
            yield self._pool.get_key_buffer(i)
            yield self._pool.get_value_buffer(i)

    def describe(self) -> Mapping[str, Any]:
        return self.layout.describe()


def _bits(part_HTD: Tensor) -> NDArray[Any]:
    """The same bits as unsigned integers."""
    whole = part_HTD.contiguous().cpu()
    flat = whole.view(-1).view(torch.uint8).numpy().view(BITS[whole.element_size()])
    return flat.reshape(tuple(whole.shape)).copy()


def _tensor(bits_HTD: NDArray[Any], dtype: torch.dtype) -> Tensor:
    whole = np.ascontiguousarray(bits_HTD)
    return torch.from_numpy(whole.view(np.uint8).reshape(-1)).view(dtype).view(whole.shape)
