"""What a backend counts. Plain numbers: written by the coordinator's thread, read by any."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stats:
    """Counters of one backend's life. Read them at any time; they only grow, but for the last five."""

    deaths: int = 0
    resumed: int = 0
    """Attempts that went on after a death."""
    tokens_prefilled: int = 0
    """Output tokens that a resume computed again by prefill."""
    tokens: int = 0
    """Output tokens that became durable."""
    finished: int = 0
    seconds_resuming: float = 0.0
    """From each death to the moment its rollouts were running again, summed over rollouts."""
    tokens_loaded: int = 0
    """Output tokens of resumed rollouts whose KV was loaded from a snapshot instead."""
    seconds_loading: float = 0.0
    """What reading snapshots took, summed over rollouts."""
    snapshots: int = 0
    """Times that a rollout's KV became durable."""
    kv_fallbacks: Counter[str] = field(default_factory=Counter)
    """Resumes that could not load all they had, by reason; "missing" where there was no snapshot."""
    turns: int = 0
    """Turns that were answered."""
    tool_calls: int = 0
    """Calls that tools were given, repeated ones included."""
    interruptions: int = 0
    """Rollouts whose worker died under them, once for each death."""
    by: Counter[str] = field(default_factory=Counter)
    """Attempts that went on after a death, by where the KV of their tokens came from: "kv" or "prefill"."""
    censored: Counter[str] = field(default_factory=Counter)
    """Rollouts that ended without finishing, by the kind of reason: what stands before a colon in it."""
    calling: int = 0
    """Rollouts that wait for their tools."""
    in_flight: int = 0
    waiting: int = 0
    durable_lag_bytes: int = 0
    workers_ready: int = 0
