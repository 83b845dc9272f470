"""A run's cohorts in the log, by their names.

run.lineage/number       a batch
run.lineage/eval/name    an evaluation
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal

from ..backend import RolloutBackend
from ..errors import CheckpointMismatch, problem
from ..wal import CohortCount

#: What to do with a checkpoint that is older than the log; see `TrainerLedger.restore`.
Fork = bool | Literal["again"]


class RunCohorts:
    """What the log has of a run. A fork begins another lineage: the same batches, sampled anew under other names.

    Args:
        cohorts: all of the job.
        run: its name.
    """

    def __init__(self, cohorts: Mapping[str, CohortCount], run: str) -> None:
        self._by_lineage: dict[int, dict[str, CohortCount]] = {}
        for name, count in cohorts.items():
            lineage, _, rest = name.removeprefix(f"{run}.").partition("/")
            if name.startswith(f"{run}.") and lineage.isdecimal():
                self._by_lineage.setdefault(int(lineage), {})[rest] = count
        self._run = run

    @property
    def newest(self) -> int:
        """The lineage that was begun last."""
        return max(self._by_lineage, default=0)

    def batches(self, lineage: int) -> dict[int, CohortCount]:
        """By number."""
        found = self._by_lineage.get(lineage, {})
        return {int(rest): count for rest, count in found.items() if rest.isdecimal()}

    def left(self, *, evaluations: bool) -> Iterator[tuple[int, str]]:
        """Lineages and names of the batches, or of the evaluations, of which something is left."""
        for lineage, found in self._by_lineage.items():
            for rest, count in found.items():
                if count.gone < count.size and rest.startswith("eval/") == evaluations:
                    yield lineage, f"{self._run}.{lineage}/{rest}"

    def lineage_from(self, lineage: int, batches: int, fork: Fork) -> int:
        """The lineage to go on in from a checkpoint: its own, or a later one, which is a fork.

        Args:
            lineage, batches: of the checkpoint, which contains every batch below that number.
            fork: see `TrainerLedger.restore`.

        Raises:
            CheckpointMismatch: going on from there takes a fork, which was not asked for, or another one.
        """
        forked = self.batches(self.newest)
        if self.newest > lineage and fork != "again":
            here = self.newest == lineage + 1 and min(forked, default=batches) == batches
            if fork and here and not any(count.gone for count in forked.values()):
                return self.newest
            raise CheckpointMismatch(
                problem(
                    f"run {self._run!r} was forked: the log has lineage {self.newest}, from batch "
                    f"{min(forked, default=0)} on, and the checkpoint is of lineage {lineage}",
                    consequence="Nothing was changed; forking once more would give that lineage up",
                    remedy="Resume from the newest checkpoint of that lineage; if it has none, from the one it began "
                    'at, with fork=True; or give it up with fork="again"',
                )
            )
        later = [number for number, count in self.batches(lineage).items() if number >= batches and count.gone]
        if later and not fork:
            raise CheckpointMismatch(
                problem(
                    f"the log has consumed batch {max(later)} of run {self._run!r}, and the checkpoint contains only "
                    f"those below {batches}",
                    consequence="Nothing was changed; going on would drop the batches in between from the training",
                    remedy="Resume from the newest checkpoint, or pass fork=True to train on fresh samples from here, "
                    "or use another run name",
                )
            )
        return max(self.newest, lineage) + 1 if later or self.newest > lineage else lineage


def abandon(backend: RolloutBackend, cohort: str) -> None:
    """Give up what is unfinished of a cohort, and let go of all that is left of it."""
    for rollout in backend.in_flight(cohort):
        backend.abort(rollout, reason="abandoned")
    if left := [r.id for r in backend.again(cohort)]:
        backend.release(left)


def fresh_cohort(cohorts: Mapping[str, CohortCount], name: str, *, anew: bool = False) -> str:
    """A name like this one of which nothing is gone: for rollouts that nobody trains on, and that are let go.

    Args:
        anew: of which nothing was begun either.
    """
    names = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(1)))
    return next(n for n in names if n not in cohorts or not (anew or cohorts[n].gone))
