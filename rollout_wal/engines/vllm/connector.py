"""An out-of-tree KV connector: KV of resumed requests goes into vLLM's blocks, and that of running ones comes out.

The store is the caller's (`rollout_wal.kv`, driven by the backend's worker); this moves bytes between it and the paged
cache of an engine in the same process. It moves whole blocks: on a CPU, vLLM packs keys within a block as the
processor's instructions like them, so a block is the smallest thing that has a meaning. The tokens of the last,
partial block are computed again.

Shape legend: B = blocks, H = heads, N = tokens of a block, C = what a head keeps of a token, T = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from ...errors import KvError, problem
from ...kv.layout import BITS, KvArrays

CONNECTOR = "BlockConnector"


@dataclass(frozen=True)
class Load:
    """Blocks of one request that are to be filled: tokens start..stop of what was offered."""

    name: str
    start: int
    stop: int
    blocks: tuple[int, ...]


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the worker to load before a step."""

    loads: list[Load] = field(default_factory=list)


class BlockConnector(KVConnectorBase_V1):
    """vLLM makes two: one beside its scheduler, one beside its model runner."""

    offered: ClassVar[dict[str, KvArrays]] = {}
    """KV by request id, until it is loaded."""
    loaded_tokens: ClassVar[int] = 0
    caches: ClassVar[dict[str, torch.Tensor]] = {}
    """The paged cache of each layer, [B, H, N, C]."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block = int(vllm_config.cache_config.block_size)
        self._wanted: list[Load] = []

    # -- beside the scheduler -----------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        arrays = self.offered.get(request.request_id)
        if arrays is None:
            return 0, False
        # At least one token is left to compute: its logits are wanted.
        usable = min(len(arrays), request.num_tokens - 1) // self._block * self._block
        return max(0, usable - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if not num_external_tokens:
            self.offered.pop(request.request_id, None)
            return
        arrays = self.offered[request.request_id]
        stop = min(len(arrays), request.num_tokens - 1) // self._block * self._block
        start = stop - num_external_tokens
        (ids,) = blocks.get_block_ids()
        self._wanted.append(
            Load(request.request_id, start, stop, tuple(ids[start // self._block : stop // self._block]))
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        wanted, self._wanted = self._wanted, []
        return Loads(wanted)

    # -- beside the model runner ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        BlockConnector.caches = dict(sorted(kv_caches.items()))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            arrays = self.offered.pop(load.name)
            scatter(self.caches, load, arrays, self._block)
            BlockConnector.loaded_tokens += load.stop - load.start

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return  # what is saved is asked for between steps, see `gather`

    def wait_for_save(self) -> None:
        return


def shape_of(caches: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """(heads, tokens of a block, width) of the layers' caches.

    Raises:
        KvError: caches that are not of one shape [B, H, N, C].
    """
    shapes = {tuple(cache.shape[1:]) for cache in caches.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise KvError(
            problem(
                f"the KV cache has layers of shapes {sorted(shapes)}",
                consequence="Rollouts are resumed by prefill",
                remedy="None is needed; models whose layers keep different things are not saved",
            )
        )
    heads, tokens, width = next(iter(shapes))
    return int(heads), int(tokens), int(width)


def gather(caches: dict[str, torch.Tensor], blocks: list[int], token_T: NDArray[np.int32]) -> KvArrays:
    """The content of whole blocks, as `KvLayout` wants it: for each layer the halves of C as keys and values."""
    at = torch.tensor(blocks)
    parts: list[NDArray[Any]] = []
    for cache in caches.values():
        heads, _, width = cache.shape[1:]
        # [B, H, N, C] -> [H, T, C]
        content = cache[at.to(cache.device)].permute(1, 0, 2, 3).reshape(heads, -1, width).cpu()
        bits = content.contiguous().view(_BITS[content.element_size()]).numpy().view(BITS[content.element_size()])
        parts += [np.ascontiguousarray(bits[..., : width // 2]), np.ascontiguousarray(bits[..., width // 2 :])]
    return KvArrays(np.array(token_T, np.int32), tuple(parts), ())


def scatter(caches: dict[str, torch.Tensor], load: Load, arrays: KvArrays, block: int) -> None:
    """The inverse of `gather`, into the blocks of a request."""
    at = torch.tensor(load.blocks)
    for index, cache in enumerate(caches.values()):
        halves = (arrays.parts[2 * index], arrays.parts[2 * index + 1])
        bits = np.concatenate([half[:, load.start : load.stop] for half in halves], axis=-1)
        heads, count, width = bits.shape
        signed = np.ascontiguousarray(bits).view(f"i{bits.dtype.itemsize}")
        content = torch.from_numpy(signed).view(cache.dtype).reshape(heads, count // block, block, width)
        cache[at.to(cache.device)] = content.permute(1, 0, 2, 3).to(cache.device)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
