"""Who dies when, in a run of the student: drawn from the seed before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .config import StudentConfig

Victim = Literal["trainer", "server"]


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to `victim`, `share` of a batch's time after batch `batch` was trained on."""

    batch: int
    share: float
    victim: Victim


def draw_kills(config: StudentConfig) -> list[Kill]:
    """The kills of trainer and server, in order. Workers die at engine steps instead: see `demo.killer`."""
    if not config.kills:
        return []
    rng = np.random.default_rng([config.seed, 0x6B696C6C])
    counts: list[tuple[Victim, int]] = [("trainer", config.trainer_kills), ("server", config.server_kills)]
    kills = [
        Kill(int(rng.integers(0, max(1, config.batches - 2))), float(rng.random()), victim)
        for victim, count in counts
        for _ in range(count)
    ]
    return sorted(kills, key=lambda k: (k.batch, k.share))
