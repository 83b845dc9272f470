"""Which teachers are in memory, and whose work is done next.

Loading costs far more than scoring, so the work of a teacher that is in memory goes first, and one that is not is
loaded once its oldest item has waited as long as a load takes (as for whoever rents skis: no rule that does not know
the future wastes less in the worst case), or as long as the operator's patience. That alone could starve a rare
teacher: whoever has waited `max_wait_s` goes before everything else, oldest first. A teacher that has been loaded
works for at least as long as its load took, so that loads cannot take most of the time however much is overdue.

An item waits at most max_wait_s + n · (load + turn + unit), where n counts the teachers whose items are older, load,
turn and unit are the longest load, `turn_s` and unit of work. Pure bookkeeping: it loads nothing itself and reads no
clock.
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


class Residency:
    """What fits in memory, and what should.

    Args:
        sizes: bytes of each teacher.
        memory_bytes: for all of them together.
        pinned: loaded first and never evicted.
        max_wait_s: after which an item goes before the work of other teachers.
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
        self._demand: dict[str, tuple[float, float]] = {}
        """Arrivals, each worth less the older it is, and when that was computed."""
        self._turn: tuple[str, float] | None = None
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

    def patience_s(self, teacher: str) -> float:
        own = self._load_s.get(teacher, 0.0) if self._patience_s is None else self._patience_s
        return min(own, self.max_wait_s)

    def turn_s(self, teacher: str) -> float:
        return TURN_LOADS * self._load_s.get(teacher, 0.0)

    def next_teacher(
        self, queues: Mapping[str, Waiting], now_s: float, among: Collection[str] | None = None
    ) -> str | None:
        """Whose work to do next, loaded or not; None if there is none that is due.

        Args:
            among: those that can work now; nobody else is named. None: anybody can be loaded.
        """
        if among is not None:
            queues = {t: w for t, w in queues.items() if t in among}
        if self._turn is not None:
            teacher, since_s = self._turn
            if teacher in queues and teacher in self.resident and now_s - since_s < self.turn_s(teacher):
                return teacher
        overdue = [t for t, w in queues.items() if now_s - w.oldest_s >= self.max_wait_s]
        if overdue:
            return min(overdue, key=lambda t: queues[t].oldest_s)
        ready = [t for t in queues if t in self.resident]
        if ready:
            # The one in use last goes on: its queue empties, and it becomes the one to evict.
            return max(ready, key=lambda t: self.resident[t])
        due = [t for t in queues if self._due_s(t, queues) <= now_s]
        return max(due, key=lambda t: (queues[t].tokens, -queues[t].oldest_s), default=None)

    def next_due_s(self, queues: Mapping[str, Waiting]) -> float:
        """When work for a teacher that is not in memory is due next; infinity: never."""
        return min((self._due_s(t, queues) for t in queues if t not in self.resident), default=math.inf)

    def next_load(self, queues: Mapping[str, Waiting], now_s: float, busy: str) -> str | None:
        """A teacher to load while another works: one whose work is due, for which nothing with work has to go."""
        wanted = {t: w for t, w in queues.items() if t not in self.resident and self._due_s(t, queues) <= now_s}
        for teacher in sorted(wanted, key=lambda t: (now_s - wanted[t].oldest_s < self.max_wait_s, -wanted[t].tokens)):
            if self.victims(teacher, queues, {*queues, busy}) is not None:
                return teacher
        return None

    def victims(self, teacher: str, queues: Mapping[str, Waiting], keep: Collection[str] = ()) -> list[str] | None:
        """Whom to evict so that a teacher fits; None if it cannot be done.

        Those with the least waiting work go first, then those asked for least of late, then those used longest ago.
        """
        need = self._sizes[teacher] + self.used_bytes - self.memory_bytes
        out: list[str] = []

        def order(t: str) -> tuple[int, float, int]:
            demand, at_s = self._demand.get(t, (0.0, 0.0))
            # Decayed to one common instant, whichever: only the order counts, so logarithms do.
            return (
                queues[t].tokens if t in queues else 0,
                round(math.log2(demand) * self._half_life_s + at_s, 3) if demand else -math.inf,
                self.resident[t],
            )

        for candidate in sorted((t for t in self.resident if t not in self.pinned and t not in keep), key=order):
            if need <= 0:
                break
            out.append(candidate)
            need -= self._sizes[candidate]
        return out if need <= 0 else None

    def arrived(self, teacher: str, now_s: float) -> None:
        """Count an item, so that the teachers in demand are kept."""
        demand, at_s = self._demand.get(teacher, (0.0, now_s))
        self._demand[teacher] = demand * 0.5 ** ((now_s - at_s) / self._half_life_s) + 1.0, now_s

    def reserve(self, teacher: str) -> None:
        """Its memory is spoken for from here on."""
        self._uses += 1
        self.resident[teacher] = self._uses

    def loaded(self, teacher: str, now_s: float, load_s: float) -> None:
        self._load_s[teacher] = load_s
        self._turn = teacher, now_s

    def used(self, teacher: str, now_s: float) -> None:
        self._uses += 1
        self.resident[teacher] = self._uses
        if self._turn is None or self._turn[0] != teacher:
            self._turn = teacher, now_s

    def evicted(self, teacher: str) -> None:
        self.resident.pop(teacher, None)

    @property
    def _half_life_s(self) -> float:
        return max(1.0, 4 * self.max_wait_s)

    def _due_s(self, teacher: str, queues: Mapping[str, Waiting]) -> float:
        return queues[teacher].oldest_s + self.patience_s(teacher)
