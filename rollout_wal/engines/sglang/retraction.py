"""KV of requests that SGLang retracts, kept in this process's memory until they run again.

Retraction frees the KV of a running request because memory is short, and SGLang keeps none of it: the request is
prefilled again, which in lower precision need not give the same numbers. Here it is copied out before it is freed, and
back into the radix cache when the request is about to be scheduled. Nothing of it is durable: if the process dies, the
rollout is resumed as any other.

What is copied is complete even where steps overlap: of a request with n tokens the KV of n - 1 is taken, and that was
computed by steps whose results are in.
"""

from __future__ import annotations

from typing import Any, Final

from ...errors import KvError
from ...kv.layout import KvArrays
from ..common.support import Hook
from .hooks import ATTRIBUTE, REQ, Wrap


class RetractedKv:
    """The KV of a scheduler's retracted rollouts, by SGLang's request id. Found by the hooks on its radix cache.

    Off, so that everything is prefilled, for a cache that is not plain keys and values of attention in one pool, and
    for one that has tiers below it.

    Args:
        budget_bytes: of host memory. A request that would not fit is prefilled; 0: all are.
    """

    def __init__(self, scheduler: Any, budget_bytes: int) -> None:
        # Here, because the plug-in is loaded in processes that have not built anything yet.
        from .kv import SchedulerKv

        self._kv: SchedulerKv | None = None
        self._budget = budget_bytes
        self._kept: dict[str, KvArrays] = {}
        self._keeping = True
        self.saved_tokens = 0
        self.restored_tokens = 0
        tree = scheduler.tree_cache
        # With tiers below it, what SGLang itself has put there would have to be known too.
        tiers = getattr(tree, "cache_controller", None), getattr(tree, "linker", None)
        if budget_bytes and tiers == (None, None):
            try:
                self._kv = SchedulerKv(scheduler)
            except KvError:
                return
            setattr(tree, ATTRIBUTE, self)

    def leaving(self, req: Any) -> None:
        """The KV of a request is about to be freed."""
        if self._kv is None or not self._keeping or getattr(req, ATTRIBUTE, None) is None or req.finished():
            return
        if req.extra_key is not None or req.lora_id is not None or req.rid in self._kept:
            return  # its KV is another's for the same tokens; or: retracted before what was kept could be used
        if self._bytes() + self._kv.bytes_of(req) > self._budget:
            return
        kv = self._kv.save(req)
        if kv is not None:
            self._kept[req.rid] = kv
            self.saved_tokens += len(kv)

    def returning(self, req: Any) -> None:
        """A request is about to look for its KV in the radix cache. Whether it is then run is not known yet."""
        kv = self._kept.get(req.rid)
        if kv is None or self._kv is None:
            return
        if self._kv.cached(kv.token_T) < self._kv.whole(len(kv)) and self._kv.room() > len(kv):
            self.restored_tokens += self._kv.restore(kv)

    def of(self, rid: str) -> KvArrays | None:
        """What is kept of a request that waits to run again."""
        return self._kept.get(rid)

    def forget(self, rid: str) -> None:
        """It has run again, or never will."""
        self._kept.pop(rid, None)

    def clear(self, *, keeping: bool = True) -> None:
        """The weights change: all that is kept is of the old ones.

        Args:
            keeping: whether what is freed from here on is of the weights in force.
        """
        self._kept.clear()
        self._keeping = keeping

    def __len__(self) -> int:
        return len(self._kept)

    def _bytes(self) -> int:
        return sum(part.nbytes for kv in self._kept.values() for part in kv.parts)


def _leaving(*, req: Any, tree_cache: Any, **_: Any) -> None:
    """BEFORE schedule_batch.release_req, which frees a request's KV and puts it back where it began."""
    kept: RetractedKv | None = getattr(tree_cache, ATTRIBUTE, None)
    if kept is not None:
        kept.leaving(req)


def _returning(req: Any, tree_cache: Any = None, cow_mamba: Any = None) -> None:
    """BEFORE Req.init_next_round_input, which matches a request's tokens against the radix cache."""
    kept: RetractedKv | None = getattr(tree_cache, ATTRIBUTE, None)
    if kept is not None and req.is_retracted:
        kept.returning(req)


RETRACTION: Final = (
    Wrap(Hook("sglang.srt.managers.schedule_batch:release_req", ("req",)), "BEFORE", _leaving),
    Wrap(Hook(f"{REQ}.init_next_round_input", ("self", "tree_cache", "cow_mamba")), "BEFORE", _returning),
)
"""What keeping KV of retracted requests needs besides `hooks.SAMPLING`."""
