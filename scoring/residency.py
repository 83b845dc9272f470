"""Which teachers are in memory, and whose work is done next.

Loading costs far more than scoring, so work for a teacher that is not in memory waits for more of its kind, as long as
its patience (by default what a load takes: as for whoever rents skis, no rule that does not know the future wastes
less in the worst case), but no longer than it can: counted back from the moment when the oldest item of each teacher
has to begin, `max_wait_s` after it came, through the loads and units of work that have to fit in before it, one after
the other. Until then nobody who has work is evicted; then somebody is. Memory that is free is used at once.

Evicted are the teachers asked for least of late: one in demand would be back before long. They work first when their
place is needed, so that they leave nothing behind. A teacher that was loaded works for at least as long as its load
took before it can be evicted, so that loads cannot take most of the time however much is overdue.

An item begins within max_wait_s if loads and units take as long as the last ones did and arrivals leave room for them.
Otherwise it waits at most max_wait_s + n · (load + turn + unit), where n counts the teachers whose items are older, and
load, turn and unit are the longest load, `turn_s` and unit of work. Pure bookkeeping: it loads nothing itself and reads
no clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .errors import BadConfiguration, problem

#: Turns are at least as long as this times the load before them.
TURN_LOADS = 1.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """The queued work of one teacher.

    Args:
        tokens: to be read, over all items; more than 0.
        oldest_s: when the item that waits longest arrived, on the caller's clock.
    """

    tokens: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now.

    Args:
        load: a teacher to begin to load, after those in `evict` are gone; None: none.
        evict: in this order.
        work: whose work to do; None: nobody's.
        again_s: when a load will be due, if nothing happens before; infinity: none will.
    """

    load: str | None
    evict: tuple[str, ...]
    work: str | None
    again_s: float


class Residency:
    """What fits in memory, and what should.

    Args:
        sizes: bytes of each teacher.
        memory_bytes: for all of them together.
        pinned: loaded first and never evicted.
        max_wait_s: within which an item begins, if that is possible.
        patience_s: how long work waits for more of the same teacher before it is loaded; at most max_wait_s. The
            longer, the fewer loads. None: as long as its last load took.

    Raises:
        BadConfiguration: a teacher that does not fit beside the pinned ones.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        memory_bytes: int,
        *,
        pinned: Collection[str] = (),
        max_wait_s: float = 30.0,
        patience_s: float | None = None,
    ) -> None:
        self._sizes, self.memory_bytes, self.pinned = dict(sizes), memory_bytes, frozenset(pinned)
        self.max_wait_s = max_wait_s
        self._patience_s = patience_s
        self.resident: dict[str, int] = {}
        """Teachers in memory or on their way there, each with the count of the use that it last had."""
        self._uses = 0
        self._load_s: dict[str, float] = {}
        self._unit_s = 0.0
        self._demand: dict[str, tuple[float, float]] = {}
        """Arrivals, each worth less the older it is, and when that was computed."""
        self._turns: dict[str, float] = {}
        """Seconds that those loaded are still to work before they may be evicted, in order of their loads."""
        held = sum(sizes.get(t, 0) for t in self.pinned)
        for teacher, size in sizes.items():
            if size + held - (size if teacher in self.pinned else 0) > memory_bytes or not self.pinned <= set(sizes):
                raise BadConfiguration(
                    problem(
                        f"teacher {teacher!r} of {size} bytes does not fit into {memory_bytes} beside the pinned "
                        f"{sorted(self.pinned)}",
                        consequence="It could never be loaded, so nothing was started",
                        remedy="Give more memory, pin fewer teachers (and known ones), or choose a smaller precision",
                    )
                )

    @property
    def used_bytes(self) -> int:
        return sum(self._sizes[t] for t in self.resident)

    def load_s(self, teacher: str) -> float:
        """What loading it should take: as long as it took last, or the longest of the others."""
        return self._load_s.get(teacher, max(self._load_s.values(), default=0.0))

    def patience_s(self, teacher: str) -> float:
        own = self._load_s.get(teacher, 0.0) if self._patience_s is None else self._patience_s
        return min(own, self.max_wait_s)

    def turn_s(self, teacher: str) -> float:
        """How long it works once it is loaded, if it has the work."""
        return TURN_LOADS * self._load_s.get(teacher, 0.0)

    def plan(
        self, queues: Mapping[str, Waiting], now_s: float, *, loading: str | None = None, busy: str | None = None
    ) -> Plan:
        """What to do now.

        Args:
            loading: whose load is under way; nobody else's begins meanwhile.
            busy: who computes; nobody else does meanwhile, and its memory stays.
        """
        latest = self._latest(queues)
        due = {t: min(at, queues[t].oldest_s + self.patience_s(t)) for t, at in latest.items()}
        load: str | None = None
        evict: tuple[str, ...] = ()
        if loading is None:
            load, evict = self._next_load(queues, latest, due, now_s, busy)
        work = None
        if busy is None:
            ready = {t: w for t, w in queues.items() if t in self.resident and t != loading and t not in evict}
            work = self._next_work(ready, due, now_s)
        again = math.inf
        if load is None and loading is None:
            # What is due and cannot be done waits for a unit to end, or for its last moment.
            again = min((at for at in (*due.values(), *latest.values()) if at > now_s), default=math.inf)
        return Plan(load, evict, work, again)

    def _latest(self, queues: Mapping[str, Waiting]) -> dict[str, float]:
        """When the load of each teacher that has work and is not in memory has to begin, one load after the other.

        But no sooner than a load's time after its item came: where there are more loads than can be done in time,
        each had better serve more than one item.
        """
        latest = {}
        start = math.inf
        for teacher in sorted((t for t in queues if t not in self.resident), key=lambda t: -queues[t].oldest_s):
            oldest, load_s = queues[teacher].oldest_s, self.load_s(teacher)
            # Units that are under way then and when it is loaded come before it, and its own before the next load.
            start = min(start, oldest + self.max_wait_s - 2 * self._unit_s) - load_s - self._unit_s
            latest[teacher] = max(start, oldest + min(load_s, self.patience_s(teacher)))
        return latest

    def _next_load(
        self,
        queues: Mapping[str, Waiting],
        latest: Mapping[str, float],
        due: Mapping[str, float],
        now_s: float,
        busy: str | None,
    ) -> tuple[str | None, tuple[str, ...]]:
        order = sorted(due, key=lambda t: (due[t], queues[t].oldest_s))
        for teacher in order:
            if self._sizes[teacher] + self.used_bytes <= self.memory_bytes:
                return teacher, ()
        keep = {t for t in self._turns if t in queues}
        for teacher in order:
            if due[teacher] > now_s:
                break
            victims = self.victims(teacher, keep)
            if victims is None or busy in victims:
                continue
            if now_s >= latest[teacher] or not any(v in queues for v in victims):
                return teacher, tuple(victims)
        return None, ()

    def _next_work(self, ready: Mapping[str, Waiting], due: Mapping[str, float], now_s: float) -> str | None:
        for teacher in self._turns:
            if teacher in ready:
                return teacher
        if not ready:
            return None
        oldest = min(ready, key=lambda t: ready[t].oldest_s)
        if now_s - ready[oldest].oldest_s < self.max_wait_s:
            first = min(due, key=lambda t: due[t], default=None)
            if first is not None and due[first] <= now_s + self._unit_s:
                for victim in self.victims(first) or ():
                    if victim in ready:
                        return victim
        return oldest

    def victims(self, teacher: str, keep: Collection[str] = ()) -> list[str] | None:
        """Whom to evict so that a teacher fits; None if it cannot be done.

        Those asked for least of late go first, then those used longest ago.
        """
        need = self._sizes[teacher] + self.used_bytes - self.memory_bytes
        out: list[str] = []

        def order(t: str) -> tuple[float, int]:
            demand, at_s = self._demand.get(t, (0.0, 0.0))
            # Decayed to one common instant, whichever: only the order counts, so logarithms do.
            return round(math.log2(demand) * self._half_life_s + at_s, 3) if demand else -math.inf, self.resident[t]

        for candidate in sorted((t for t in self.resident if t not in self.pinned and t not in keep), key=order):
            if need <= 0:
                break
            out.append(candidate)
            need -= self._sizes[candidate]
        for spared in out[-2::-1]:  # the last was needed; smaller ones before it may not be
            if need + self._sizes[spared] <= 0:
                out.remove(spared)
                need += self._sizes[spared]
        return out if need <= 0 else None

    def arrived(self, teacher: str, now_s: float) -> None:
        """Count an item, so that the teachers in demand are kept."""
        demand, at_s = self._demand.get(teacher, (0.0, now_s))
        self._demand[teacher] = demand * 0.5 ** ((now_s - at_s) / self._half_life_s) + 1.0, now_s

    def reserve(self, teacher: str) -> None:
        """Its memory is spoken for from here on."""
        self._uses += 1
        self.resident[teacher] = self._uses

    def loaded(self, teacher: str, load_s: float) -> None:
        # The next may take as long as those before it: to begin too early costs less than to be late.
        self._load_s[teacher] = max(load_s, 0.8 * self._load_s.get(teacher, 0.0) + 0.2 * load_s)
        self._turns[teacher] = max(self.turn_s(teacher), 1e-9)

    def worked(self, teacher: str, took_s: float) -> None:
        """It has computed a unit."""
        self._uses += 1
        self.resident[teacher] = self._uses
        self._unit_s = max(took_s, 0.9 * self._unit_s)
        if teacher in self._turns:
            self._turns[teacher] -= max(took_s, 1e-9)
            if self._turns[teacher] <= 0:
                del self._turns[teacher]

    def evicted(self, teacher: str) -> None:
        self.resident.pop(teacher, None)
        self._turns.pop(teacher, None)

    @property
    def _half_life_s(self) -> float:
        return max(1.0, 4 * self.max_wait_s)
