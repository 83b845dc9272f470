"""Which server an item may go to: the best of those that are up, and of one checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rollout_wal.dataset import Provenance
from rollout_wal.errors import RolloutWalError

from ..errors import BadRequest, problem
from ..items import ScoreItem
from .options import ClientOptions
from .retry import of_status
from .servers import Server

#: How well a server suits an item: it has the expected checkpoint and can load it; it could not load it the last time
#: it tried; it has another checkpoint. A worse one is used only where no better one is up.
_GOOD, _FAILING, _OTHER = range(3)


@dataclass(slots=True, eq=False)
class Pending:
    """An item on its way to an outcome."""

    index: int
    item: ScoreItem
    deadline_s: float | None
    pinned: bool = False
    attempts: int = 0
    ready_s: float = 0.0
    overloaded_since_s: float | None = None
    excluded: dict[str, RolloutWalError] = field(default_factory=dict)
    """Servers that cannot score it, and why."""
    done: bool = False
    alarm: asyncio.TimerHandle | None = None


class Choice:
    """Decides for a set of servers.

    Args:
        pins: the checkpoint that each teacher is expected to have; added to as teachers are named for the first time.
    """

    def __init__(self, servers: Sequence[Server], options: ClientOptions, pins: dict[str, str]) -> None:
        self._servers, self._options, self._pins = servers, options, pins

    def may(self, server: Server, pending: Pending) -> bool:
        """Whether this server is the best that the item can be sent to now."""
        if pending.done or not self.pin(pending):
            return False
        rank = self.rank_of(server, pending)
        if rank is None or server.target in pending.excluded:
            return False
        others = (s for s in self._servers if s.up and s is not server and s.target not in pending.excluded)
        return not any((r := self.rank_of(s, pending)) is not None and r < rank for s in others)

    def rank_of(self, server: Server, pending: Pending) -> int | None:
        teacher = server.teachers.get(pending.item.teacher)
        expected = pending.item.expected
        if teacher is None or expected is None:
            return None
        if teacher.provenance.checkpoint_digest != expected.checkpoint:
            return _OTHER if self._options.other_checkpoints else None
        return _FAILING if teacher.failure else _GOOD

    def pin(self, pending: Pending) -> bool:
        """Name the teacher of an item that gives a domain, and the checkpoint that it is expected to have.

        False while no server that was reached has one. All items of a client expect the same checkpoint of a teacher,
        whichever server answers and whatever is restarted in between.
        """
        item = pending.item
        if pending.pinned:
            return True
        for server in self._servers:
            for name, teacher in server.teachers.items():
                if name == item.teacher or (not item.teacher and item.domain in teacher.domains):
                    expected = item.expected or Provenance("")
                    if not expected.checkpoint:
                        digest = self._pins.setdefault(name, teacher.provenance.checkpoint_digest)
                        expected = replace(expected, checkpoint=digest)
                    pending.item, pending.pinned = replace(item, teacher=name, expected=expected), True
                    return True
        return False

    def able(self, server: Server, pending: Pending) -> bool:
        """Whether it may score the item, now or when it is up again."""
        if server.refused or server.target in pending.excluded:
            return False
        if not server.teachers and not server.listed:
            return True  # nobody knows yet what it has
        return self.pin(pending) and self.rank_of(server, pending) is not None

    def why(self, pending: Pending) -> RolloutWalError:
        if pending.excluded:
            return next(reversed(pending.excluded.values()))
        refusals = [of_status(s.target, s.why) for s in self._servers if s.refused]
        if refusals and all(s.refused for s in self._servers):
            return refusals[-1]
        item = pending.item
        listed = sorted(
            {f"{n} at {t.provenance.checkpoint_digest}" for s in self._servers for n, t in s.teachers.items()}
        )
        return BadRequest(
            problem(
                f"no server has a teacher {item.teacher!r} (domain {item.domain!r}) with checkpoint "
                f"{item.expected.checkpoint if item.expected else 'any'!r}",
                consequence="The item was not scored",
                remedy=f"Name one of {listed}",
            )
        )
