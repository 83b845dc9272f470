"""`RolloutBackend` over any engine, its worker killed at named moments: what comes out must be what would have.

They raise ConformanceError; `backend_tests.BackendConformance` makes pytest tests of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import EngineSpec, PoisonRule, RolloutBackend
from ...backend.finished import FinishedRollout
from ...engines.base import Engine
from ...job_view import JobView
from ...params import SamplingParams
from ..witness import Witness
from .driving import drive, emptied, request
from .moments import Plan, killable, preloaded
from .settings import Conformance, close_logprobs, require, same_tokens

#: A kill of every life at these moments, in order; "twice in a row" is two of them. The count is chosen such that some
#: rollouts have finished, some run and some have just begun.
DEATHS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "before the first token": (("first_token", 1),),
    "during prefill": (("prefill", 1),),
    "sampled, not logged": (("sampled", 7),),
    "between append and durable": (("appended", 7),),
    "durable, not delivered": (("durable", 7),),
    "end of sequence sampled": (("end_sampled", 1),),
    "end of sequence between append and durable": (("end_appended", 2),),
    "end of sequence durable, not delivered": (("end_durable", 2),),
    "during prefill of a resume": (("appended", 9), ("prefill", 1)),
    "twice in a row": (("appended", 5), ("first_token", 1)),
    "again and again": (("sampled", 3), ("durable", 2), ("prefill", 1), ("end_appended", 1), ("appended", 2)),
}
UPDATE_DEATHS = ("update_begun", "update_loaded", "update_logged")


@dataclass(frozen=True, slots=True)
class Run:
    """What a backend handed out, in the order in which it did."""

    rollouts: tuple[FinishedRollout, ...]
    undurable: tuple[int, ...] = ()
    """Rollouts of which not every token was durable in the logs when they were handed out."""
    killed: tuple[str, ...] = ()


class KilledBackend(AbstractContextManager["KilledBackend"]):
    """One worker, killed by a plan.

    Args:
        spec: the engine under test.
        folder: for logs and the plan.
        options: further arguments of RolloutBackend.
        backend: the class under test.
    """

    def __init__(
        self,
        spec: EngineSpec,
        folder: Path,
        settings: Conformance,
        options: Mapping[str, Any] | None = None,
        *,
        backend: type[RolloutBackend] = RolloutBackend,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.path = folder / "wal"
        self.plan = Plan(folder)
        self._spec = spec
        self._folder = folder
        self._cls = backend
        self._options = {"workers": 1, "slots": 64, "segment_bytes": 1 << 20, **(options or {})}
        self._stack = ExitStack()
        self._runs = 0
        self._calm: dict[SamplingParams, Run] = {}

    def __enter__(self) -> KilledBackend:
        with self._stack:
            self.witness = self._stack.enter_context(Witness(self._folder / "w.sock"))
            with preloaded(self._spec):
                self.backend = self._stack.enter_context(
                    self._cls(
                        killable(self._spec, self.plan),
                        self.path,
                        # Every death is one of ours: none of them is the rollout's fault.
                        poison=PoisonRule(deaths=1000),
                        witness=str(self.witness.path),
                        **self._options,
                    )
                )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def submit(self, sampling: SamplingParams, **named: Any) -> Any:
        """One cohort of three of each prompt, always with the same seeds; the iterator of what comes out."""
        self._runs += 1
        return self.backend.generate(
            self.settings.prompts, sampling, group_size=3, seed=5, cohort=f"conformance-{self._runs}", **named
        )

    def run(self, sampling: SamplingParams, lives: Sequence[tuple[str, int]] = (), **named: Any) -> Run:
        """Generate one cohort while the worker's lives end as planned."""
        self.plan.lay(*lives)
        return self.collect(self.submit(sampling, **named))

    def collect(self, iterator: Any) -> Run:
        """Everything that comes out. Each rollout is looked up in the logs, from outside, the moment it is there."""
        rollouts, undurable = [], []
        for rollout in iterator:
            view = JobView(self.path)
            view.refresh()
            if not _durable(view, rollout):
                undurable.append(rollout.id)
            rollouts.append(rollout)
            self.witness.expect(rollout.id, rollout.tokens)
        self.backend.consumed(sorted({r.id for r in rollouts}), epoch=0, step=self._runs, release=False)
        return Run(tuple(rollouts), tuple(undurable), tuple(self.plan.killed()))

    def calm(self, sampling: SamplingParams) -> Run:
        """The same cohort, uninterrupted."""
        if sampling not in self._calm:
            self._calm[sampling] = self.run(sampling)
        return self._calm[sampling]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until something has come to pass, or the time of the settings is over."""
        deadline = time.monotonic() + self.settings.timeout_s
        while not condition():
            require(time.monotonic() < deadline, f"it did not come to that within {self.settings.timeout_s:g} s")
            time.sleep(0.005)


def _durable(view: JobView, rollout: FinishedRollout) -> bool:
    known = view.job.rollouts.get(rollout.id)
    if known is None or (known.finish is None and known.censor is None):
        return False
    return bool(np.array_equal(view.tokens(known).token_T, rollout.tokens))


def each_once(run: Run, expected: int) -> None:
    """Every rollout of the cohort, none twice, none censored, all of it sampled tokens with logprobs."""
    indexes = Counter(r.index for r in run.rollouts)
    twice = sorted(i for i, n in indexes.items() if n > 1)
    require(not twice, f"rollouts {twice} were delivered more than once")
    missing = sorted(set(range(expected)) - set(indexes))
    require(not missing, f"rollouts {missing} were never delivered")
    require(len(indexes) == expected, f"{len(indexes)} rollouts were delivered instead of {expected}")
    for r in run.rollouts:
        require(r.censored is None, f"rollout {r.index} was censored as {r.censored}")
        require(bool(r.output.sampled_T.all()), f"rollout {r.index} has tokens that nobody sampled")
        for name, values in (("logprob", r.output.logprob), ("sampling_logprob", r.output.sampling_logprob)):
            require(
                len(values.value_T) == len(r.tokens),
                f"rollout {r.index}: {len(values.value_T)} values of {name} for {len(r.tokens)} tokens",
            )
            lacking = np.flatnonzero(~values.valid_T)
            require(not len(lacking), f"rollout {r.index} lacks its {name} at tokens {lacking.tolist()}")


def as_uninterrupted(run: Run, calm: Run, settings: Conformance) -> None:
    """Rollout by rollout the same tokens, logprobs, ends and policy versions as in the uninterrupted run."""
    twin = {r.index: r for r in calm.rollouts}
    mine = sorted(run.rollouts, key=lambda r: r.index)
    same_tokens(
        [r.tokens.tolist() for r in mine],
        [twin[r.index].tokens.tolist() for r in mine],
        settings,
        "rollouts of a killed worker",
    )
    for r in mine:
        other = twin[r.index]
        what = f"rollout {r.index}"
        require(r.prompt.tolist() == other.prompt.tolist(), f"{what} belongs to another prompt than its twin")
        if r.tokens.tolist() != other.tokens.tolist():
            continue  # within the share that rounding may change
        close_logprobs(r.output.logprob.value_T, other.output.logprob.value_T, settings, what)
        close_logprobs(r.output.sampling_logprob.value_T, other.output.sampling_logprob.value_T, settings, what)
        require(
            r.finish_reason is other.finish_reason,
            f"{what} ended as {r.finish_reason.name} instead of {other.finish_reason.name}",
        )
        wrong = np.flatnonzero(r.output.version_T != other.output.version_T)
        require(
            not len(wrong),
            f"{what}: policy versions {r.output.version_T[wrong][:3].tolist()} instead of "
            f"{other.output.version_T[wrong][:3].tolist()} at tokens {wrong[:3].tolist()}",
        )


def deaths_took_place(run: Run, lives: Sequence[tuple[str, int]]) -> None:
    """The kills happened where they were planned, and the rollouts tell of them."""
    planned = [moment for moment, _ in lives]
    require(
        list(run.killed) == planned, f"the worker died at {list(run.killed)} instead of {planned}: nothing was shown"
    )
    interruptions = [r.interruptions for r in run.rollouts]
    require(max(interruptions) >= 1, "a worker died with rollouts in flight, and none of them says so")
    require(max(interruptions) <= len(lives), f"a rollout counts {max(interruptions)} deaths; there were {len(lives)}")


def nothing_early(run: Run) -> None:
    """Output commit: what was handed out was in the logs, durably, before it was."""
    require(not run.undurable, f"rollouts {list(run.undurable)} were delivered before all of them was durable")


def accounts_hold(backend: KilledBackend) -> None:
    """begun = delivered + in flight + censored, and nobody was shown a token that is not in what was delivered."""
    balance = backend.backend.balance()
    require(balance.holds and balance.in_flight == 0, f"the accounts do not hold: {balance}")
    lost = backend.witness.lost()
    require(lost == 0, f"{lost} tokens that the backend had shown are not in what it delivered")


def survives(backend: KilledBackend, lives: Sequence[tuple[str, int]]) -> None:
    """All of the above, for one sequence of deaths."""
    settings = backend.settings
    sampling = SamplingParams(max_tokens=settings.max_tokens)
    calm = backend.calm(sampling)
    run = backend.run(sampling, lives)
    each_once(run, 3 * len(settings.prompts))
    deaths_took_place(run, lives)
    as_uninterrupted(run, calm, settings)
    nothing_early(run)
    accounts_hold(backend)


def fresh_noise_keeps_what_was_shown(backend: KilledBackend) -> None:
    """With noise drawn afresh at each resume lost tokens do not come back, so what was delivered too early shows."""
    settings = backend.settings
    # Early: on a busy machine several steps become durable at once, and fresh noise may end all rollouts soon.
    lives = (("durable", 2), ("end_appended", 1))
    run = backend.run(SamplingParams(max_tokens=settings.max_tokens), lives, noise="attempt")
    each_once(run, 3 * len(settings.prompts))
    deaths_took_place(run, lives)
    nothing_early(run)
    accounts_hold(backend)


def update_survives(backend: KilledBackend, engine: Engine, moment: str, original: Path) -> None:
    """Killed while new weights come in: every token has the version that sampled it, versions only rise, and what
    each version would have sampled is what is there.

    Args:
        engine: of the same spec, in this process, to say what each version would have sampled.
    """
    settings = backend.settings
    if settings.other_weights is None:
        raise ValueError("the check of a policy update needs Conformance.other_weights")
    sampling = SamplingParams(max_tokens=4 * settings.max_tokens, ignore_eos=True)
    old = backend.calm(sampling)
    # By index: rows come in order of completion.
    calm = {r.index: r for r in old.rollouts}
    backend.plan.lay((moment, 1))
    before = backend.backend.stats.tokens
    iterator = backend.submit(sampling)
    backend.wait(lambda: backend.backend.stats.tokens > before + len(calm) * settings.max_tokens // 2)
    version = backend.backend.policy_version + 1
    backend.backend.update_weights(str(settings.other_weights), version)
    run = backend.collect(iterator)
    each_once(run, len(calm))
    require(
        list(run.killed) == [moment], f"the worker died at {list(run.killed)} instead of {moment}: nothing was shown"
    )
    require(backend.backend.policy_version == version, f"the policy version is {backend.backend.policy_version}")
    nothing_early(run)
    accounts_hold(backend)
    both = 0
    engine_version, got, expected = engine.policy_version, [], []
    with emptied(engine):
        try:
            engine.load_weights(Path(settings.other_weights), engine_version + 1)
            for r in run.rollouts:
                versions = r.output.version_T
                known = {version - 1, version}
                require(
                    set(versions.tolist()) <= known,
                    f"rollout {r.index} has versions {set(versions.tolist())}, not {known}",
                )
                require(bool((np.diff(versions) >= 0).all()), f"rollout {r.index}: policy versions fall")
                kept = int((versions < version).sum())
                both += 0 < kept < len(versions)
                rest: list[int] = []
                if kept < len(versions):
                    resumed = request(0, r.prompt.tolist(), sampling, prefix=r.tokens[:kept].tolist(), noise_key=r.seed)
                    rest = drive(engine, [resumed])[0].tokens
                got.append(r.tokens.tolist())
                expected.append(calm[r.index].tokens[:kept].tolist() + rest)
        finally:
            engine.load_weights(original, engine_version + 2)
    require(both > 0, "no rollout was running during the update: nothing was shown")
    same_tokens(got, expected, settings, "rollouts that were running during an update")
