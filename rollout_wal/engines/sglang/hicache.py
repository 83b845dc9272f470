"""A storage tier for SGLang's hierarchical cache, on the project's KV store: durable, checksummed, of these weights.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config \\
      '{"backend_name": "rollout_wal", "module_path": "rollout_wal.engines.sglang.hicache",
        "class_name": "RolloutKvStorage", "path": "runs/kv"}'

SGLang names a page by a hash over its tokens and all before them, whatever weights computed it: its own file tier hands
out pages of the old weights after an update. Here a page's key takes in the policy version and the weights' digest,
which the plug-in knows; so the plug-in has to be configured too. A damaged or foreign page is a miss.

A page is kept as eight rows of bits; its hash stands where the store expects tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from torch import Tensor

from ...errors import KvError, problem
from ...kv.hashing import Chain, Run
from ...kv.layout import BITS, DTYPE_BYTES, Attention, KvArrays, KvLayout
from ...kv.store import KvStore
from . import plugin

log = logging.getLogger("sglang.rollout_wal")

_ROWS: Final = 8
_OPTIONS: Final = frozenset({"path", "index", "codec", "budget_bytes", "file_bytes"})


class RolloutKvStorage(HiCacheStorage):
    """See the module. Called from SGLang's prefetch and backup threads; one of them at a time does anything.

    `storage_config.extra_config`: `path`, and optionally `index`, `codec`, `budget_bytes`, `file_bytes`; see `KvStore`.

    Raises:
        KvError: no path, the plug-in is not configured, or the store cannot be opened.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        extra = dict(storage_config.extra_config or {})
        if not extra.get("path") or not os.environ.get(plugin.LOG):
            raise KvError(
                problem(
                    "no path for KV pages is configured"
                    if not extra.get("path")
                    else f"KV pages are to be stored, and {plugin.LOG} is not set",
                    consequence="No page is stored: pages of other weights could not be told from those in force",
                    remedy=f'Pass "path" in the extra config, and set {plugin.LOG}',
                )
            )
        c = storage_config
        # Shards of one page are pages of their own. Where the latent KV is replicated, all ranks share them.
        ranks = [c.pp_rank, c.pp_size, c.attn_cp_rank, c.attn_cp_size, c.dcp_rank, c.dcp_size]
        self._shard = [*ranks, *([] if c.is_mla_model else [c.tp_rank, c.tp_size])]
        self._model = str(c.model_name)
        self.store = KvStore(
            os.path.join(extra["path"], "-".join(map(str, self._shard))),
            **{name: value for name, value in extra.items() if name in _OPTIONS - {"path"}},
        )
        self._lock = threading.Lock()
        self._chains: dict[tuple[torch.dtype, int], Chain] = {}
        self._version: int | None = None

    # -- HiCacheStorage -----------------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:
        """Into `target_location`, a page of the host pool; None for a miss."""
        (page,) = self.batch_get([key], [target_location])
        return page

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Tensor | None]:
        out: list[Tensor | None] = [None] * len(keys)
        with self._lock:
            weights = self._weights()
            for at, (key, target) in enumerate(zip(keys, target_locations or [], strict=True)):
                if weights is None or not self._load(key, target, weights):
                    break  # a page behind a miss is of no use
                out[at] = target
        return out

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """True once all of them are durable."""
        with self._lock:
            weights = self._weights()
            if weights is None:
                return False
            try:
                for key, value in zip(keys, values, strict=True):
                    chain = self._chain(value)
                    page = value.detach().cpu().contiguous().view(-1)
                    bits = page.view(torch.uint8).numpy().view(BITS[value.element_size()])
                    half = page.numel() // _ROWS // 2
                    rows = bits.reshape(_ROWS, -1)
                    parts = (rows[None, :, :half], rows[None, :, half:])
                    self.store.save(
                        _name(key, weights), KvArrays(_tokens(key), _whole(parts), ()), chain, _runs(weights)
                    )
                self.store.commit()
            except KvError as error:
                log.warning("KV pages were not stored: %s", error)
                return False
        return True

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the first on are there, for the weights in force."""
        with self._lock:
            weights = self._weights()
            count = 0
            while weights is not None and count < len(keys) and self.store.manifest(_name(keys[count], weights)):
                count += 1
        return count

    def clear(self) -> None:
        with self._lock:
            self._collect(lambda version: False)

    def get_stats(self) -> None:
        """SGLang's metrics have no place for these; see `store.metrics`."""
        return

    def close(self) -> None:
        with self._lock:
            self.store.close()

    # -- pages --------------------------------------------------------------------------------------------------

    def _weights(self) -> tuple[int, str] | None:
        """Version and digest of those in force; None while pages cannot be told apart."""
        weights = plugin.kv_weights()
        if weights is not None and weights[0] != self._version:
            if self._version is not None:
                version = weights[0]
                self._collect(lambda of_page: of_page == version)
            self._version = weights[0]
        return weights

    def _collect(self, keep: Callable[[int], bool]) -> None:
        try:
            self.store.gc(lambda manifest: all(keep(version) for version in manifest.versions))
        except KvError as error:
            log.warning("KV pages were not collected: %s", error)

    def _load(self, key: str, target: Tensor, weights: tuple[int, str]) -> bool:
        try:
            chain = self._chain(target)
        except KvError as error:
            log.warning("%s", error)
            return False
        loaded = self.store.load(_tokens(key), chain, _runs(weights), name=_name(key, weights))
        if loaded.arrays is None or loaded.tokens != _ROWS:
            return False
        rows = np.concatenate([part[0] for part in loaded.arrays.parts], axis=1)
        page = torch.from_numpy(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        target.view(-1).view(torch.uint8).copy_(page)
        return True

    def _chain(self, page: Tensor) -> Chain:
        shape = (page.dtype, page.numel())
        if shape not in self._chains:
            dtype = str(page.dtype).removeprefix("torch.")
            if dtype not in DTYPE_BYTES or page.numel() % (2 * _ROWS):
                raise KvError(
                    problem(
                        f"a KV page has {page.numel()} elements of {dtype}",
                        consequence="It is not stored, and computed again when it is needed",
                        remedy=f"Use a cache of {sorted(DTYPE_BYTES)} with pages of a multiple of {2 * _ROWS} elements",
                    )
                )
            half = page.numel() // _ROWS // 2
            layout = KvLayout(dtype, (Attention(1, half, half),))
            self._chains[shape] = Chain(layout, f"{self._model}:{self._shard}", _ROWS)
        return self._chains[shape]


def _name(key: str, weights: tuple[int, str]) -> str:
    return hashlib.blake2b(f"{key}:{weights}".encode(), digest_size=16).hexdigest()


def _tokens(key: str) -> NDArray[np.int32]:
    """A page's hash as the ids of its rows."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=4 * _ROWS).digest(), "<i4").astype(np.int32)


def _runs(weights: tuple[int, str]) -> tuple[Run, ...]:
    return (Run(_ROWS, *weights),)


def _whole(parts: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
    return tuple(np.ascontiguousarray(part) for part in parts)
