"""When a writer syncs what is pending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """When pending appends are synced.

    kind:
        step: whoever waits syncs at once, together with everything that is pending then.
        group: waiters wait until `group_ms` have passed since the oldest pending append, or `group_bytes` are pending.
        none: nothing is ever synced. For tests of other things: a crash of the machine loses acknowledged records.
    """

    kind: Literal["step", "group", "none"] = "step"
    group_ms: float = 5.0
    group_bytes: int = 1 << 20
