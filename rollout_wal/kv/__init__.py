"""KV snapshots: the cache of unfinished rollouts is saved when they are preempted, and loaded instead of recomputed.

`store` keeps blocks, `snapshots` stands between an engine and a store; `docs/kv-snapshots.md` describes both.
"""

from .codec import Codec
from .engine import SupportsKv
from .hashing import Chain, Run
from .layout import KvArrays, KvLayout
from .metrics import KvMetrics, Loaded, Saved
from .snapshots import KvConfig, Snapshots
from .store import KvStore

__all__ = [
    "Chain",
    "Codec",
    "KvArrays",
    "KvConfig",
    "KvLayout",
    "KvMetrics",
    "KvStore",
    "Loaded",
    "Run",
    "Saved",
    "Snapshots",
    "SupportsKv",
]
