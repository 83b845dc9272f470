"""How often teachers are loaded that do not all fit in memory, beside the fewest loads that were possible."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_wal.testing.tiny_models import make_tiny_model
from scoring.items import ScoreItem
from scoring.residency import Residency
from scoring.scheduler import Limits, Scheduler
from scoring.teachers.hf import HfTeacherSource

TEACHERS, FIT = 10, 3
#: No item's answer shall take longer.
MAX_WAIT_S = 10.0
#: What the server is told: items begin sooner than they must be answered, and as late as that, to share a load.
BEGIN_S = 9.8
ARRIVALS_PER_S = 40.0


def draw_arrivals(seconds: float, seed: int) -> list[tuple[float, int]]:
    """(time, teacher): Poisson, teacher i with a share of 1 / (i + 1)."""
    rng = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, TEACHERS + 1)
    times = np.cumsum(rng.exponential(1.0 / ARRIVALS_PER_S, int(3 * seconds * ARRIVALS_PER_S)))
    times = times[times < seconds]
    return list(zip(times.tolist(), rng.choice(TEACHERS, len(times), p=shares / shares.sum()).tolist()))


def fewest_loads(arrivals: Sequence[tuple[float, int]], wait_s: float) -> int:
    """A lower bound on the loads of any schedule that knows all arrivals, begins every item within `wait_s`, and holds
    FIT teachers; loading and computing take no time.

    A teacher in memory from u to v serves what arrived from u − wait to v. Without loss, u is the first open arrival
    plus wait and v an arrival, so that all stays lie between the first arrival plus wait and the last arrival, and
    sum to at most FIT times that. With a price on the time of stays instead of that limit (a Lagrange multiplier),
    the teachers are independent of each other, and each one's cheapest schedule is a recursion over its arrivals.
    The sum of them less the price of the limit is a bound at any price; this is the largest over many.
    """
    own = [np.asarray([at for at, t in arrivals if t == teacher]) for teacher in range(TEACHERS)]
    times = np.asarray([at for at, _ in arrivals])
    room_s = FIT * max(0.0, float(times.max() - times.min()) - wait_s)

    def bound(price: float) -> float:
        return sum(_cheapest(at, wait_s, price) for at in own if len(at)) - price * room_s

    return math.ceil(max(bound(price) for price in np.geomspace(0.1 / wait_s, 10.0 / wait_s, 200)) - 1e-9)


def _cheapest(arrivals: NDArray[np.float64], wait_s: float, price: float) -> float:
    """Loads plus price times the seconds of stays, of one teacher."""
    n = len(arrivals)
    ends = np.searchsorted(arrivals, arrivals + wait_s, side="right")  # what a visit at the last moment leaves open
    cost = np.zeros(n + 1)
    stay = np.full(n + 1, np.inf)  # the least of price · arrival j + cost[j + 1] over all j from here on
    for i in range(n - 1, -1, -1):
        stay[i] = min(stay[i + 1], price * arrivals[i] + cost[i + 1])
        # `stay` of later entries is complete: ends[i] > i.
        cost[i] = 1.0 + min(cost[ends[i]], stay[ends[i]] - price * (arrivals[i] + wait_s))
    return float(cost[0])


def measure_loads(folder: Path, seconds: float) -> dict[str, Any]:
    """The real scheduler with real teachers, in real time."""
    sources = [
        HfTeacherSource(f"t{i}", make_tiny_model(folder / f"tiny{i}", seed=i, mean_length=30.0), precision="float32")
        for i in range(TEACHERS)
    ]
    size = max(source.info.nbytes for source in sources)
    arrivals = draw_arrivals(seconds, 7)
    residency = Residency({s.info.id: size for s in sources}, FIT * size, max_wait_s=BEGIN_S, patience_s=BEGIN_S)
    scheduler = Scheduler(sources, residency, limits=Limits())
    rng = np.random.default_rng(0)
    waits: list[float] = []

    async def one(teacher: int) -> None:
        tokens = rng.integers(4, 300, 40).astype(np.int32)
        started = time.perf_counter()
        await scheduler.score(ScoreItem(tokens, (8, 40), f"t{teacher}"))
        waits.append(time.perf_counter() - started)

    async def run() -> None:
        scheduler.start()
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for at, teacher in arrivals:
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                tasks.create_task(one(teacher))
        await scheduler.stop()

    asyncio.run(run())
    loads = sum(scheduler.counters.loads.values())
    bound = fewest_loads(arrivals, max(MAX_WAIT_S, *waits))
    return {
        "teacher_loads": loads,
        "teacher_loads_lower_bound": bound,
        "teacher_loads_ratio_to_min": loads / bound,
        "teacher_wait_max_s": max(waits),
        "teacher_wait_bound_s": MAX_WAIT_S,
        "teacher_items": len(arrivals),
    }
