"""What a server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scheduler takes on.

    Args:
        max_item_tokens: that one item reads; more is refused for good.
        max_item_result_bytes: of one item's result; more is refused for good.
        max_queued_tokens: of all accepted items that are not finished; more is refused for now.
        work_tokens: taken from a teacher's queue at a time. The more, the better they sort by length and share
            prompts; the fewer, the sooner another teacher gets its turn.
        linger_s: how long work that finds the server idle waits for company: groups and batches arrive one by one.
        unit_stall_s: a unit of work that takes longer makes the server unhealthy.
        cache_backlog_bytes: of scores that wait for the disk; beyond that they are not kept.
    """

    max_item_tokens: int = 131_072
    max_item_result_bytes: int = 512 << 20
    max_queued_tokens: int = 4_000_000
    work_tokens: int = 65_536
    linger_s: float = 0.01
    unit_stall_s: float = 900.0
    cache_backlog_bytes: int = 256 << 20
