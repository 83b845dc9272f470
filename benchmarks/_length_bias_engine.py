"""The cells of `length_bias` with the embedded engine: real workers, killed for real.

All rollouts run on one worker, which is killed (SIGKILL) at a constant hazard per engine step. Each arm is compared
with an uninterrupted run of the same prompts with other noise, except the keyed one, which has the same.

Lengths: no end of sequence before `min_tokens`, then a constant chance. Their deviation is a quarter of their mean, so
that 5,000 rollouts show equivalence at 2 %; plainly geometric lengths would take 27,000 per arm, and show nothing more.
The reused seed needs an early chance to end, and is run with geometric lengths.

Clusters: prompts, and the worker's life in which a rollout began. The life in which it *was hit* would not do: those
that are hit are the longer ones, so their sums differ from the mean where there is no bias at all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rollout_wal.audit.compare import Comparison, Settings, compare, pilot
from rollout_wal.audit.equivalence import rollouts_needed
from rollout_wal.audit.estimate import hazard_per_token
from rollout_wal.audit.lengths import LengthDistribution
from rollout_wal.audit.policies import Policy, Restart, Resume
from rollout_wal.audit.schedules import constant
from rollout_wal.audit.simulate import simulate
from rollout_wal.audit.table import RolloutTable
from rollout_wal.audit.theory import Prediction, predict
from rollout_wal.backend import EngineSpec, PoisonRule, RolloutBackend
from rollout_wal.demo.baseline import Baseline, Mode
from rollout_wal.demo.killer import BackendKiller, KillSchedule
from rollout_wal.params import SamplingParams
from rollout_wal.prompts import rollout_seed
from rollout_wal.testing.tiny_models import make_tiny_model

MARGIN = 0.02
QUANTILE_MARGIN = 0.06
ROLLOUTS_MIN = 5_000
#: What two cores do in a quarter of an hour, deaths included. A cell that needs more says so in `rollouts_needed`.
ROLLOUTS_MAX = 8_000
GROUP = 8
#: Rollouts at once, and so lost together. Fewer where the bias is to be measured: more lives are more evidence.
SLOTS = 128
SLOTS_DEFECT = 48
LAG = 20
_Z_90, _Z_99 = 1.645, 2.576


@dataclass(frozen=True, slots=True)
class Lengths:
    """A model's end of sequence, and how it is sampled."""

    name: str
    sampling: SamplingParams
    mean_after_min: float
    hazard: float

    def spec(self, folder: Path, slots: int, factory: str | None = None) -> EngineSpec:
        model = folder / f"model-{self.mean_after_min:g}"
        if not model.is_dir():
            make_tiny_model(model, mean_length=self.mean_after_min)
        # A resume is prefilled in one step, so that steps are tokens for every running rollout.
        spec = EngineSpec(str(model), options={"max_batch": slots, "prefill_chunk": 16384})
        return spec if factory is None else replace(spec, factory=factory)


RISING = Lengths(
    "no end before 25 tokens, then geometric with mean 10", SamplingParams(max_tokens=120, min_tokens=26), 10.0, 0.025
)
GEOMETRIC = Lengths("geometric with mean 30, at most 150", SamplingParams(max_tokens=150), 30.0, 0.03)


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One arm."""

    table: RolloutTable
    tokens: dict[int, tuple[int, ...]]
    deaths: int
    slots: int
    seconds: float

    @property
    def hazard(self) -> float:
        """Interruptions per token sampled, lost ones included."""
        assert self.table.recomputed_N is not None
        return hazard_per_token(self.table)


class CountingBaseline(Baseline):
    """Notes for each rollout how often it was interrupted, what it lost, and in which life of the worker it began."""

    def begin_counting(self, rollouts: int) -> None:
        self.hits = np.zeros(rollouts, np.int64)
        self.lost = np.zeros(rollouts, np.int64)
        self.life = np.full(rollouts, -1, np.int64)

    def _submit(self, waiting: Any, sampling: SamplingParams) -> None:
        super()._submit(waiting, sampling)
        for running in self._slot.values():
            for rollout in running.values():
                if self.life[rollout.index] < 0:
                    self.life[rollout.index] = self.result.deaths

    def _lose(self, worker: Any, waiting: Any) -> None:
        shown = {r.index: (r, len(r.tokens)) for r in self._slot[worker.name].values()}
        super()._lose(worker, waiting)
        for index, (rollout, length) in shown.items():
            self.hits[index] += 1
            self.lost[index] += max(0, length - len(rollout.tokens))


def prompts_of(rollouts: int) -> list[list[int]]:
    """One prompt for each group."""
    return [[1, 4 + i % 370, 4 + (i * 7) % 370, 4 + (i * 31) % 370] for i in range(rollouts // GROUP)]


def with_log(
    lengths: Lengths, spec: EngineSpec, rollouts: int, *, noise: Literal["position", "attempt"], kills: bool, seed: int
) -> Run:
    """RolloutBackend."""
    begun = time.monotonic()
    outputs: dict[int, Any] = {}
    lives: dict[int, int] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        RolloutBackend(
            spec,
            folder,
            workers=1,
            slots=spec.options["max_batch"],
            segment_bytes=1 << 20,
            poison=PoisonRule(deaths=1000),
        ) as backend,
    ):
        killer = BackendKiller(backend, KillSchedule(lengths.hazard if kills else 0.0, seed, sigterm=0.0))
        killer.start()
        for r in backend.generate(
            prompts_of(rollouts), lengths.sampling, group_size=GROUP, seed=seed, noise=noise, progress=False
        ):
            outputs[r.index] = r
            # One worker: every death since it began was one of its own.
            lives[r.index] = backend.stats.deaths - r.interruptions
        deaths = killer.stop()
        balance = backend.balance()
        assert balance.holds, balance
        assert balance.in_flight == 0, balance
    order = sorted(outputs)
    return Run(
        _table(
            np.array([len(outputs[i].tokens) for i in order]),
            np.array([outputs[i].interruptions for i in order]),
            np.array([lives[i] for i in order]),
            np.array([outputs[i].censored or "" for i in order]),
            None,
        ),
        {i: tuple(outputs[i].tokens.tolist()) for i in order},
        deaths,
        spec.options["max_batch"],
        time.monotonic() - begun,
    )


def without(lengths: Lengths, spec: EngineSpec, rollouts: int, *, mode: Mode, seed: int) -> Run:
    """What others do."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        baseline = CountingBaseline(
            spec,
            Path(folder),
            mode=mode,
            workers=1,
            slots=spec.options["max_batch"],
            lag=LAG,
            schedule=KillSchedule(lengths.hazard, seed, sigterm=0.0),
        )
        baseline.begin_counting(rollouts)
        prompts = [np.asarray(p, np.int32) for p in prompts_of(rollouts) for _ in range(GROUP)]
        seeds = [rollout_seed(seed, i) for i in range(rollouts)]
        result = baseline.run(prompts, seeds, lengths.sampling, tick=lambda _: None)
    length_N = np.array([len(result.tokens[i]) for i in range(rollouts)])
    return Run(
        _table(length_N, baseline.hits, baseline.life, np.full(rollouts, ""), baseline.lost),
        {i: tuple(result.tokens[i]) for i in range(rollouts)},
        result.deaths,
        spec.options["max_batch"],
        time.monotonic() - begun,
    )


def _table(length_N: Any, hits_N: Any, life_N: Any, reason_N: Any, lost_N: Any) -> RolloutTable:
    return RolloutTable(
        prompt_N=np.arange(len(length_N)) // GROUP,
        length_N=length_N,
        interruptions_N=hits_N,
        reason_N=reason_N,
        worker_N=life_N,
        recomputed_N=lost_N,
    )


def predicted(policy: Policy, calm: RolloutTable, hazard: float, seed: int) -> Prediction:
    """What theory makes of the uninterrupted run's lengths at the hazard that was realised.

    The model draws one length law for all prompts (see `make_tiny_model`), so they are pooled.
    """
    law = LengthDistribution.from_lengths(calm.length_N)
    if getattr(policy, "noise", "fresh") != "reused":
        return predict(law, constant(hazard), policy)
    # No exact law for reused noise at a random moment: a million simulated rollouts.
    run = simulate([law], constant(hazard), policy, rollouts=1_000_000, seed=seed)
    return Prediction(law, LengthDistribution.from_lengths(run.table.length_N), 1.0, np.zeros(law.longest + 1))


def cell(
    policy: Policy, lengths: Lengths, run: Run, calm: Run, settings: Settings, hazard: float, needed: int | None
) -> dict[str, Any]:
    """One row of the result."""
    calm_table = replace(calm.table, worker_N=None)
    keyed = getattr(policy, "noise", "fresh") == "keyed"
    reused = getattr(policy, "noise", "fresh") == "reused"
    measured = compare(
        policy.name,
        run.table,
        calm_table,
        settings=settings,
        prediction=predicted(policy, calm.table, hazard, settings.seed),
    )
    low, high = measured.interval_relative
    identical = sum(run.tokens[i] == calm.tokens[i] for i in run.tokens) if keyed else None
    return {
        "policy": policy.name,
        "engine": "embedded",
        "lengths": lengths.name,
        "interruptions": f"SIGKILL at a hazard of {lengths.hazard:g} per step, {run.slots} rollouts at once",
        "noise": getattr(policy, "noise", "fresh"),
        "rollouts": measured.rollouts,
        "rollouts_needed": needed,
        "deaths": run.deaths,
        "interrupted_share": measured.interrupted_share,
        "hazard_per_token": hazard,
        "true_mean": measured.reference_mean,
        "mean": measured.mean,
        "mean_delta_relative": measured.delta_relative,
        "ci_low": low,
        "ci_high": high,
        "margin": settings.margin,
        "predicted_delta_relative": measured.predicted_delta_relative,
        "equivalence": measured.verdict,
        "p_difference": max(t.p_corrected for t in measured.tests),
        "design_effect": measured.design_effect,
        "power": measured.power,
        "identical_to_uninterrupted": None if identical is None else identical == len(run.tokens),
        "verdict": verdict(measured, keyed_identical=identical == len(run.tokens) if keyed else None, reused=reused),
        "seconds": run.seconds,
    }


def verdict(measured: Comparison, *, keyed_identical: bool | None, reused: bool) -> str:
    """ "expected" where theory and measurement agree.

    With no bias predicted: equivalence is shown (keyed: every rollout is the uninterrupted one, token for token). With
    a bias predicted: it is shown, and the prediction lies within the 99 % interval. Of the reused seed only the
    direction is demanded: theory reuses the one draw that decides the end, an engine reuses a draw per token, and the
    other tokens' logits are others the second time.
    """
    expected = measured.predicted_delta_relative
    assert expected is not None
    low, high = measured.interval_relative
    if keyed_identical is not None:
        agrees = keyed_identical
    elif abs(expected) < 1e-9:
        agrees = measured.verdict == "equivalent"
    elif reused:
        agrees = measured.verdict == "biased" and low > 0
    else:
        reach = (high - low) / 2 * _Z_99 / _Z_90
        agrees = measured.verdict == "biased" and abs(measured.delta_relative - expected) <= reach
    return "expected" if agrees else "unexpected"


def engine_cells(quick: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Yields each cell as soon as it is there."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _cells(Path(folder), quick, seed)


def _cells(folder: Path, quick: bool, seed: int) -> Iterator[dict[str, Any]]:
    margin = 0.1 if quick else MARGIN
    settings = Settings(margin=margin, quantile_margin=3 * margin, seed=seed)
    spec, small = RISING.spec(folder, SLOTS), RISING.spec(folder, SLOTS_DEFECT)
    # Every arm has seeds of its own: noise that two arms share would make them alike.
    first = with_log(RISING, small, 200 if quick else 600, noise="attempt", kills=True, seed=seed + 11)
    variance, inflation = pilot(first.table)
    needed = rollouts_needed(
        variance,
        margin=margin * float(first.table.length_N.mean()),
        power=settings.power,
        alpha=settings.alpha,
        design_effect=max(inflation, 1.0),
        arms=2,
    )
    rollouts = needed if quick else min(max(ROLLOUTS_MIN, needed), ROLLOUTS_MAX)
    rollouts = -(-rollouts // GROUP) * GROUP
    calm = with_log(RISING, spec, rollouts, noise="position", kills=False, seed=seed)
    fresh = with_log(RISING, spec, rollouts, noise="attempt", kills=True, seed=seed + 1)
    yield cell(Resume(1, "commit"), RISING, fresh, calm, settings, RISING.hazard, needed)
    keyed = with_log(RISING, spec, rollouts, noise="position", kills=True, seed=seed)
    yield cell(Resume(1, "commit", "keyed"), RISING, keyed, calm, settings, RISING.hazard, None)
    few = 160 if quick else 2_000
    for number, (mode, policy) in enumerate(_BASELINES, start=2):
        run = without(RISING, small, few, mode=mode, seed=seed + number)
        yield cell(policy, RISING, run, calm, settings, run.hazard, None)
    spec = GEOMETRIC.spec(folder, SLOTS_DEFECT)
    calm = with_log(GEOMETRIC, spec, few, noise="attempt", kills=False, seed=seed + 4)
    defect = GEOMETRIC.spec(folder, SLOTS_DEFECT, "rollout_wal.testing.defects:ReusedSeed.from_folder")
    reused = with_log(GEOMETRIC, defect, few, noise="position", kills=True, seed=seed + 5)
    yield cell(Resume(0, "commit", "reused"), GEOMETRIC, reused, calm, settings, GEOMETRIC.hazard, None)


_BASELINES: tuple[tuple[Mode, Policy], ...] = (("restart", Restart()), ("early", Resume(LAG, "early")))
