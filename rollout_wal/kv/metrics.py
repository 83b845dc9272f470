"""What a store says of its work: counters, and the outcome of a save and of a load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .layout import KvArrays


@dataclass(slots=True)
class KvMetrics:
    """Counters of one open store."""

    bytes_raw: int = 0
    """Of the blocks that were written, before the codec."""
    bytes_written: int = 0
    blocks_written: int = 0
    blocks_shared: int = 0
    """Blocks that were there already, from another rollout or from an earlier snapshot of the same."""
    snapshots: int = 0
    tokens_saved: int = 0
    tokens_loaded: int = 0
    bytes_loaded: int = 0
    """Raw bytes handed to the engine."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Why KV could not be used, by reason."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot that is durable and can be found."""

    name: str
    tokens: int
    key: str
    """Of its last block, in hex."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` found. `reason` says why it is not more: "" if it is all that was asked for."""

    arrays: KvArrays | None
    tokens: int
    reason: str = ""
    detail: str = ""
