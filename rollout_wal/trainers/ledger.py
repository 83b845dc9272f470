"""The agreement between a trainer's checkpoints and the log: no rollout trained on twice, none dropped.

A trainer that dies goes back to its last checkpoint; the optimizer steps since then never happened. So a rollout is
*used* when a step has seen it, and *consumed*, for good, only when a durable checkpoint contains that step:

    generate ─▶ steps use it ─▶ checkpoint, which names what it contains ─▶ checkpoint durable ─▶ Consumed in the log
                                                                        (killed here: `restore` finishes it)

Killed before the checkpoint is durable, the trainer starts from the one before, asks for the same batches by number,
and gets the same rollouts under the same ids, token for token. What is unfinished goes on while it starts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from numpy.typing import ArrayLike

from ..backend import FinishedRollout, RolloutBackend
from ..dataset import DatasetWriter
from ..delivery import to_sample
from ..errors import BadInput, CheckpointMismatch, problem
from ..params import SamplingParams
from .facts import Facts
from .run_cohorts import Fork, RunCohorts, abandon, fresh_cohort
from .state_file import STATE_FILE, drop_state, read_state, sync_tree, write_state

__all__ = [
    "STATE_FILE",
    "Facts",
    "Fork",
    "TrainerLedger",
    "abandon",
    "drop_state",
    "fresh_cohort",
    "read_state",
    "sync_tree",
    "write_state",
]

_FORMAT: Final = 1


@dataclass(slots=True)
class _Batch:
    """Rollouts of one generation, from their delivery until a checkpoint contains their last step. Their tokens are in
    the log: many batches of them may come between two checkpoints."""

    cohort: str
    rollouts: list[int]
    """Their ids."""
    sampling: SamplingParams
    step: int = 0
    """The optimizer step that used them last."""
    rewards: dict[int, float] = field(default_factory=dict)
    """By rollout id; those without one are absent."""
    facts: dict[int, Facts] = field(default_factory=dict)
    """By rollout id; those of which nothing is said are absent."""


class TrainerLedger:
    """Numbers a trainer's batches and consumes them with its checkpoints. One per trainer process and backend.

    Args:
        run: a name for this training run, unique in the job. It begins the names of the cohorts.
        archive: a dataset folder that keeps every consumed rollout with its reward and its step, which is what
            `rollout-wal trace` reads; None keeps nothing.
        extras: added to each archived rollout, for instance which trainer and verifier.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        run: str,
        *,
        archive: Path | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        if not run or "/" in run:
            raise BadInput(
                problem(
                    f"the run's name {run!r} is empty or has a slash in it",
                    consequence="Nothing was started",
                    remedy="Pass a short name such as 'grpo'",
                )
            )
        self._backend = backend
        self._run = run
        self._lineage = 0
        self._open: dict[int, _Batch] = {}
        self._evaluations: list[int] = []
        """Ids of their rollouts."""
        self._archive = archive
        self._extras = dict(extras or {})

    # -- batches --------------------------------------------------------------------------------------------------

    def generate(
        self,
        batch: int,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> list[FinishedRollout]:
        """The rollouts of batch number `batch`, in the order of the prompts. Asked for again, the same ones.

        Raises:
            CohortMismatch: this batch is in the log with other prompts or parameters: the trainer's data order or
                configuration has changed since.
        """
        rollouts = self._rollouts(self.cohort(batch), prompts, sampling, group_size, seed, metadata, progress)
        if len(rollouts) != len(prompts) * group_size:
            raise CheckpointMismatch(
                problem(
                    f"batch {batch} of run {self._run!r} has {len(rollouts)} rollouts left of "
                    f"{len(prompts) * group_size}: a checkpoint that contains it made the log let go of the others",
                    consequence="Nothing was generated; training on what is left would use some rollouts twice",
                    remedy="Resume from the newest checkpoint, or call restore(..., fork=True) to sample anew",
                )
            )
        self.take(batch, rollouts, sampling)
        return rollouts

    def evaluate(
        self,
        name: str,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int | None = None,
        anew: bool = False,
    ) -> list[FinishedRollout]:
        """Rollouts that no step will use. They are let go with the next checkpoint, or by `drop_evaluations`.

        Asked for again under one name, they are the same ones until then, and others afterwards.

        Args:
            anew: others each time: what an earlier process has begun under this name may be of another policy.
        """
        cohort = fresh_cohort(self._backend.cohorts(), f"{self._run}.{self._lineage}/eval/{name}", anew=anew)
        rollouts = self._rollouts(cohort, prompts, sampling, group_size, seed, None, False)
        self._evaluations += [r.id for r in rollouts]
        return rollouts

    def drop_evaluations(self) -> None:
        """Let go of all evaluations of this run, those included that a process before this one had begun: the backend
        goes on with them when it starts, though nobody may ever ask for them."""
        self._evaluations.clear()
        for _, name in RunCohorts(self._backend.cohorts(), self._run).left(evaluations=True):
            abandon(self._backend, name)

    def _rollouts(
        self,
        cohort: str,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        group_size: int,
        seed: int | None,
        metadata: Sequence[Mapping[str, Any]] | None,
        progress: bool,
    ) -> list[FinishedRollout]:
        found = self._backend.generate(
            prompts,
            sampling,
            group_size=group_size,
            seed=seed,
            cohort=cohort,
            metadata=metadata,
            progress=progress,
        )
        return sorted(found, key=lambda r: r.index)

    def cohort(self, batch: int) -> str:
        """The name of a batch's cohort."""
        return f"{self._run}.{self._lineage}/{batch}"

    def begun(self, batch: int) -> bool:
        """Whether the log has this batch: it goes on, or was sampled, under the policy that it began with."""
        return self._backend.cohort(self.cohort(batch)) is not None

    def settle(self) -> None:
        """Wait until no batch is in flight. Before other weights are put in force for anything else: what a process
        before this one had begun would go on under them."""
        for _, name in RunCohorts(self._backend.cohorts_in_flight(), self._run).left(evaluations=False):
            deque(self._backend.again(name), maxlen=0)

    def take(self, batch: int, rollouts: Sequence[FinishedRollout], sampling: SamplingParams) -> None:
        """Batch number `batch` was generated under its cohort's name without this object: these are its rollouts."""
        self._open[batch] = _Batch(self.cohort(batch), [r.id for r in rollouts], sampling)

    def used(
        self,
        batch: int,
        step: int,
        rewards: Mapping[int, float] | None = None,
        facts: Mapping[int, Facts] | None = None,
    ) -> None:
        """Optimizer step `step` uses this batch, the last to do so as yet.

        Args:
            rewards: by rollout id. NaN stands for none.
            facts: by rollout id; see `Facts`.
        """
        entry = self._open[batch]
        entry.step = step
        entry.rewards |= {i: float(r) for i, r in (rewards or {}).items() if not math.isnan(r)}
        entry.facts |= facts or {}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state(self, batches: int, step: int) -> dict[str, Any]:
        """What a checkpoint must hold, as plain types: it contains every step that used a batch below `batches`.

        Until `commit`, the log still has those rollouts; should the process die in between, `restore` finishes it.
        """
        mark = self._backend.mark
        return {
            "format": _FORMAT,
            "job": mark.job,
            "lsn": mark.lsn,
            "run": self._run,
            "lineage": self._lineage,
            "batches": batches,
            "step": step,
            "using": {
                str(number): {
                    "step": b.step,
                    "sampling": b.sampling.to_dict(),
                    "rewards": {str(rollout): reward for rollout, reward in b.rewards.items()},
                    "facts": {str(rollout): facts.to_dict() for rollout, facts in b.facts.items()},
                }
                for number, b in sorted(self._open.items())
                if number < batches
            },
        }

    def commit(self, state: Mapping[str, Any]) -> None:
        """The checkpoint that holds `state` is durable: what it contains is consumed, and never comes again."""
        for number in sorted(n for n in self._open if n < state["batches"]):
            self._consume(self._open[number])
            del self._open[number]
        if self._evaluations:
            self._backend.release(self._evaluations)
            self._evaluations.clear()

    def _consume(self, batch: _Batch) -> None:
        if not batch.rollouts:
            return
        if self._archive is not None:
            self._keep(batch, self._archive)
        self._backend.consumed(batch.rollouts, epoch=self._lineage, step=batch.step)

    def _keep(self, batch: _Batch, folder: Path) -> None:
        """Before Consumed: killed in between, they are archived again under the same keys, which adds nothing."""
        info = self._backend.info
        writer = DatasetWriter(folder, writer_id="trainer", check_fence=self._backend.check_fence)
        samples = []
        for r in sorted(self._backend.again(batch.cohort), key=lambda r: r.index):
            sample = batch.facts.get(r.id, Facts()).add_to(to_sample(r, info, batch.sampling))
            extras = {**sample.extras, **self._extras, "optimizer_step": batch.step, "run": self._run}
            samples.append(replace(sample, reward=batch.rewards.get(r.id), extras=extras))
        writer.seal(samples)

    def restore(self, state: Mapping[str, Any] | None, *, fork: Fork = False) -> None:
        """Bring the log to where the checkpoint is from which the trainer goes on.

        Args:
            state: what the checkpoint holds; None: the trainer starts from the beginning.
            fork: the log has consumed batches that this checkpoint does not contain. True: give them up, and sample
                anew under other cohort names, in a lineage of its own. Called again with the same checkpoint, it goes
                on in that lineage while nothing of it is consumed. Then a checkpoint of its own is there to go on
                from, and this one is refused: "again" gives that lineage up, too, each time it is called.

        Raises:
            CheckpointMismatch: the checkpoint is of another job or run, older than the log (without `fork`), or newer
                than the log. Nothing was changed.
        """
        lineage = self.lineage_from(state, fork=fork)
        self._lineage = 0 if state is None else int(state["lineage"])
        if state is not None:
            self._finish_commit(state)
        if lineage > self._lineage:
            found = RunCohorts(self._backend.cohorts(), self._run)
            for of, name in [*found.left(evaluations=False), *found.left(evaluations=True)]:
                if of < lineage:
                    abandon(self._backend, name)
        self._lineage = lineage

    def lineage_from(self, state: Mapping[str, Any] | None, *, fork: Fork = False) -> int:
        """The lineage that `restore` goes on in: that of the checkpoint, or a later one, which is a fork.

        Raises:
            CheckpointMismatch: as `restore`. This changes nothing.
        """
        lineage = batches = 0
        if state is not None:
            self._check(state)
            lineage, batches = int(state["lineage"]), int(state["batches"])
        return RunCohorts(self._backend.cohorts(), self._run).lineage_from(lineage, batches, fork)

    def _check(self, state: Mapping[str, Any]) -> None:
        mark = self._backend.mark
        wrong = ""
        if state.get("format") != _FORMAT:
            wrong = f"it has format {state.get('format')!r}, and this version reads {_FORMAT}"
        elif (state["job"], state["run"]) != (mark.job, self._run):
            wrong = f"it belongs to run {state['run']!r} of job {state['job']}, not {self._run!r} of {mark.job}"
        elif state["lsn"] > mark.lsn:
            wrong = f"it was written at LSN {state['lsn']}, and the log ends at {mark.lsn}: the log is an older copy"
        if wrong:
            raise CheckpointMismatch(
                problem(
                    f"the checkpoint does not fit the log: {wrong}",
                    consequence="Nothing was changed",
                    remedy="Use the log directory that this checkpoint was trained with, or a new run name",
                )
            )

    def _finish_commit(self, state: Mapping[str, Any]) -> None:
        """The process died between its checkpoint and the log's Consumed."""
        known = self._backend.cohorts()
        for number, used in state["using"].items():
            name = self.cohort(int(number))
            if name in known and known[name].gone < known[name].size:
                rewards = {int(i): float(r) for i, r in used["rewards"].items()}
                facts = {int(i): Facts.from_dict(raw) for i, raw in used.get("facts", {}).items()}
                left = [r.id for r in self._backend.again(name)]
                sampling = SamplingParams.from_dict(used["sampling"])
                self._consume(_Batch(name, left, sampling, used["step"], rewards, facts))
