"""What a server counts. Plain numbers, written by one thread and read by any."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_wal.histogram import Histogram

#: Of waiting and answering, in seconds: from a cache hit to a teacher that is loaded first.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


def _seconds() -> Histogram:
    return Histogram(_SECONDS)


@dataclass(slots=True)
class Counters:
    """Of one scheduler and the server in front of it, since it started."""

    accepted_items: int = 0
    coalesced_items: int = 0
    """Waiting for the computation of an identical item; accepted as well."""
    cached_items: int = 0
    """Answered from disk; not among the accepted."""
    scored_items: int = 0
    """Computed, each once however many waited for it."""
    scored_tokens: int = 0
    refused_overload: int = 0
    refused_draining: int = 0
    refused_bad: int = 0
    """Requests that can never be scored: malformed, too large, other provenance."""
    refused_token: int = 0
    """Calls without a valid bearer token."""
    deadline_passed: int = 0
    cancelled: int = 0
    failed: int = 0
    cache_skipped: int = 0
    """Scores not kept, because the disk could not follow."""
    stalled_streams: int = 0
    """Streams that were ended because their client did not read or write on."""
    loads: dict[str, int] = field(default_factory=dict)
    load_failures: dict[str, int] = field(default_factory=dict)
    evictions: dict[str, int] = field(default_factory=dict)
    load_s: float = 0.0
    busy_s: float = 0.0
    waited_s: Histogram = field(default_factory=_seconds)
    """From acceptance to the unit of work that computed the item."""
    answered_s: Histogram = field(default_factory=_seconds)
    """From acceptance to the result."""


def count(where: dict[str, int], name: str) -> None:
    where[name] = where.get(name, 0) + 1
