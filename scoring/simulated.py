"""What a residency does with arrivals, in simulated time: the scheduler's loop without teachers.

To choose `max_wait_s` and `patience_s` for a load that one knows, and to test the policy over many loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .residency import Residency, Waiting


@dataclass(slots=True)
class Outcome:
    """Of a simulation.

    Args:
        loads: teachers in the order in which they were loaded.
        waited_s: of each item, in order of its beginning, from arrival to the unit of work that computed it.
        ended_s: when everything was done.
    """

    loads: list[str] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0


def simulate(
    residency: Residency,
    arrivals: Iterable[tuple[float, str]],
    load_s: Callable[[str], float],
    unit_s: Callable[[int], float],
    *,
    unit_items: int = 1_000_000,
) -> Outcome:
    """Every item in its turn, until all are done. For a residency that is new: nothing is in memory.

    Args:
        arrivals: (second, teacher), in order of time.
        load_s: seconds that a load of a teacher takes.
        unit_s: seconds that a unit of so many items takes.
        unit_items: most of a unit.

    Raises:
        RuntimeError: items wait for ever, or memory is exceeded: a defect of the policy.
    """
    out, open_items = Outcome(), list(reversed(list(arrivals)))
    queues: dict[str, list[float]] = {}
    now, loading, load_ends, load_took, busy, unit_ends, unit_took = 0.0, None, math.inf, 0.0, None, math.inf, 0.0
    while open_items or queues or loading or busy:
        while open_items and open_items[-1][0] <= now:
            at, teacher = open_items.pop()
            queues.setdefault(teacher, []).append(at)
            residency.arrived(teacher, at)
        if loading is not None and load_ends <= now:
            residency.loaded(loading, load_took)
            loading, load_ends = None, math.inf
        if busy is not None and unit_ends <= now:
            residency.worked(busy, unit_took)
            busy, unit_ends = None, math.inf
        waiting = {t: Waiting(len(items), items[0]) for t, items in queues.items()}
        plan = residency.plan(waiting, now, loading=loading, busy=busy)
        if plan.load is not None:
            for victim in plan.evict:
                residency.evicted(victim)
            residency.reserve(plan.load)
            if residency.used_bytes > residency.memory_bytes or loading is not None or busy in plan.evict:
                raise RuntimeError(f"at {now} s it plans {plan}, with {residency.resident} in memory")
            out.loads.append(plan.load)
            loading, load_took = plan.load, load_s(plan.load)
            load_ends = now + load_took
        if plan.work is not None:
            items = queues[plan.work]
            taken, queues[plan.work] = items[:unit_items], items[unit_items:]
            if not queues[plan.work]:
                del queues[plan.work]
            out.waited_s += [now - at for at in taken]
            busy, unit_took = plan.work, unit_s(len(taken))
            unit_ends = now + unit_took
        due = max(plan.again_s, now + 1e-3)
        following = min(open_items[-1][0] if open_items else math.inf, load_ends, unit_ends, due)
        if math.isinf(following) and queues:
            raise RuntimeError(f"at {now} s nothing is planned for {sorted(queues)}")
        now = max(now, following) if not math.isinf(following) else now
    out.ended_s = now
    return out
