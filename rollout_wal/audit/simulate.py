"""A fleet of workers, simulated step by step: the mechanism itself, not its formulas.

Every token draws its own noise and ends its rollout or not; losses, durable tokens and deliveries are tracked as a real
backend would. Nothing here uses `theory`, so that the two can be held against each other.

Rollouts are begun in waves: all workers start at clock 0 (or somewhere in the cycle), and the next wave begins
when the last rollout of this one is accounted for. No wave is ever cut short, so the cohort is closed.

Shape legend: N = rollouts, S = slots of a wave, W = workers of a wave, P = prompts, L = lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .lengths import LengthDistribution
from .policies import Drop, Evict, KeepFirst, Policy, Restart, Resume, Truncate
from .schedules import Interruptions
from .table import Ints, RolloutTable

STEPS_MAX = 100_000
"""Steps per wave after which what is still running is censored: it is interrupted before it can ever finish."""


@dataclass(frozen=True, eq=False, slots=True)
class LossExposure:
    """Steps of exposure and losses, by (tokens kept, frontier): the frontier is the position reached, or that would
    have been had it not ended.

    Two attempts that began with the same tokens kept and are at the same frontier are of the same age and have as many
    durable tokens. One that is known to have ended must be lost as often as one that goes on (H2). The frontier alone
    would not do: where the hazard depends on the clock, it depends on the age, and so does the share that has ended.
    """

    running_steps: Ints
    running_losses: Ints
    ended_steps: Ints
    ended_losses: Ints


@dataclass(frozen=True, eq=False, slots=True)
class Simulation:
    """What a simulated fleet delivered.

    `noise_reused` counts tokens that were drawn with noise which an earlier position of the same rollout had used.
    `delivered_before_durable` counts rollouts that were delivered when their last token could still be lost.
    """

    table: RolloutTable
    exposure: LossExposure
    noise_reused: int
    delivered_before_durable: int
    steps: int


def simulate(
    true: LengthDistribution | Sequence[LengthDistribution],
    process: Interruptions,
    policy: Policy,
    *,
    rollouts: int,
    seed: int = 0,
    slots: int = 16384,
) -> Simulation:
    """Run `rollouts` rollouts, spread evenly over the prompts, until each is delivered or censored.

    Args:
        true: the law of lengths of each prompt.
        slots: rollouts that run at once; a wave takes a multiple of what a worker and a group hold.
    """
    prompts = [true] if isinstance(true, LengthDistribution) else list(true)
    unit = process.slots_per_worker * (policy.of if isinstance(policy, KeepFirst) else 1)
    slots = max(unit, slots // unit * unit)
    # Under these rules the backend restarts what is interrupted; what is removed is decided once all has finished.
    inner: Policy = Restart() if isinstance(policy, KeepFirst | Evict) else policy
    rng = np.random.default_rng([seed, 0])
    longest = max(p.longest for p in prompts)
    lag = 0 if not isinstance(inner, Resume) or process.notice else inner.lag
    # A stratum is kept * width + frontier. Only what resumes keeps anything.
    counts = np.zeros((4, (longest if isinstance(inner, Resume) else 1) * (longest + lag + 2)), dtype=np.int64)
    waves = []
    for first in range(0, rollouts, slots):
        prompt_S = np.arange(first, min(first + slots, rollouts)) % len(prompts)
        # The first noise of each rollout comes from its own stream: runs of one seed differ only in what befalls them.
        noise = np.random.default_rng([seed, 1, first])
        waves.append(_Wave(prompts, prompt_S, process, inner, lag, rng, noise, counts).run())
    table = _join(waves, process.slots_per_worker)
    match policy:
        case KeepFirst():
            table = _keep_first(table, policy, rng)
        case Evict():
            table = _evict(table, policy, rng)
        case _:
            pass
    exposure = LossExposure(*counts[:, counts.any(axis=0)])
    return Simulation(
        table,
        exposure,
        sum(w.noise_reused for w in waves),
        sum(w.delivered_before_durable for w in waves),
        sum(w.clock for w in waves),
    )


@dataclass(eq=False, slots=True)
class _Wave:
    prompts: list[LengthDistribution]
    prompt_S: Ints
    process: Interruptions
    policy: Policy
    lag: int
    """Steps from sampling to durable. A notice is time to flush."""
    rng: np.random.Generator
    first_noise: np.random.Generator
    counts: NDArray[np.int64]
    """What `LossExposure` is made of, added up over the waves; [4, strata]."""
    clock: int = 0
    noise_reused: int = 0
    delivered_before_durable: int = 0
    end_PL: NDArray[np.float32] = field(init=False)
    noise_SL: NDArray[np.float32] = field(init=False)
    held_S: Ints = field(init=False)
    """Tokens sampled so far."""
    kept_S: Ints = field(init=False)
    """Tokens with which the attempt began."""
    age_S: Ints = field(init=False)
    """Steps since the attempt began; it goes on counting while a finished rollout waits to be durable."""
    seen_S: Ints = field(init=False)
    """Noise indices 0..seen-1 have been used (for counting reuse)."""
    ended_S: NDArray[np.bool_] = field(init=False)
    reason_S: NDArray[np.object_] = field(init=False)
    interruptions_S: Ints = field(init=False)
    recomputed_S: Ints = field(init=False)
    failure_S: Ints = field(init=False)
    done_at_S: Ints = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.prompt_S)
        longest = max(p.longest for p in self.prompts)
        self.end_PL = np.ones((len(self.prompts), longest + 1), dtype=np.float32)
        for row, prompt in zip(self.end_PL, self.prompts):
            row[: prompt.longest + 1] = prompt.end_hazard_L()
        self.noise_SL = self.first_noise.random((size, longest), dtype=np.float32)
        self.held_S, self.kept_S, self.age_S, self.seen_S = (np.zeros(size, dtype=np.int64) for _ in range(4))
        self.interruptions_S, self.recomputed_S, self.done_at_S = (np.zeros(size, dtype=np.int64) for _ in range(3))
        self.failure_S = np.full(size, -1, dtype=np.int64)
        self.ended_S = np.zeros(size, dtype=bool)
        self.reason_S = np.full(size, "", dtype=object)

    @property
    def commits(self) -> bool:
        return isinstance(self.policy, Resume) and self.policy.delivery == "commit"

    @property
    def reuses(self) -> bool:
        return isinstance(self.policy, Resume) and self.policy.noise == "reused"

    def run(self) -> _Wave:
        size, per_worker = len(self.prompt_S), self.process.slots_per_worker
        workers = -(-size // per_worker)
        worker_S = np.arange(size) // per_worker
        aligned = self.process.phase == "aligned"
        phase_W = np.zeros(workers, np.int64) if aligned else self.rng.integers(len(self.process.cycle), size=workers)
        notice_W = np.full(workers, -1)
        position_hazard = self.process.position_hazard(self.end_PL.shape[1] - 1)
        # When the last token is durable as soon as it is sampled, recovery finds the rollout finished.
        kill = 0.0 if isinstance(self.policy, Resume) and self.lag == 0 else self.process.finish_kill
        active = np.arange(size)
        while len(active) and self.clock < STEPS_MAX:
            self.clock += 1
            running = active[~self.ended_S[active]]
            self.held_S[running] += 1
            self.age_S[active] += 1
            held = self.held_S[running]
            ends = self._draw(running) < self.end_PL[self.prompt_S[running], held]
            just_ended = running[ends]
            killed = just_ended[self.rng.random(len(just_ended)) < kill] if kill else just_ended[:0]
            self.ended_S[just_ended] = True
            if self.process.position:
                going_on = running[~ends]
                own = self.rng.random(len(going_on)) < position_hazard[self.held_S[going_on]]
                killed = np.concatenate([killed, going_on[own]])
            kept = self.kept_S[active]
            stratum = kept * (self.end_PL.shape[1] + self.lag + 1) + kept + self.age_S[active]
            was_ended = self.ended_S[active]
            self._lose(killed, worker_S)
            remaining = np.setdiff1d(active, killed, assume_unique=True) if len(killed) else active
            self._deliver(remaining)
            remaining = remaining[self.done_at_S[remaining] == 0]
            hit_W = self._clock_losses(notice_W, phase_W)
            lost = remaining[hit_W[worker_S[remaining]]] if hit_W.any() else remaining[:0]
            self._count(active, stratum, was_ended, np.concatenate([killed, lost]), remaining)
            self._lose(lost, worker_S)
            active = active[self.done_at_S[active] == 0]
        self.reason_S[active] = "never finished"
        self.done_at_S[active] = self.clock
        return self

    def _draw(self, running: Ints) -> NDArray[np.float32]:
        if not self.reuses:
            return np.asarray(self.noise_SL[running, self.held_S[running] - 1])
        index = self.age_S[running] - 1
        self.noise_reused += int((index < self.seen_S[running]).sum())
        self.seen_S[running] = np.maximum(self.seen_S[running], index + 1)
        return np.asarray(self.noise_SL[running, index])

    def _clock_losses(self, notice_W: Ints, phase_W: Ints) -> NDArray[np.bool_]:
        """Which workers are interrupted now."""
        hazard_W = self.process.hazard(phase_W + self.clock)
        hit_W = np.asarray(self.rng.random(len(phase_W)) < hazard_W)
        if not self.process.notice:
            return hit_W
        # The interruption is announced now and comes `notice` steps later; after it the worker begins afresh.
        notice_W[notice_W > 0] -= 1
        notice_W[(notice_W == -1) & hit_W] = self.process.notice
        due_W = np.asarray(notice_W == 0)
        notice_W[due_W] = -1
        return due_W

    def _deliver(self, slots: Ints) -> None:
        ready = slots[self.ended_S[slots]]
        if isinstance(self.policy, Resume):
            durable = self.kept_S[ready] + self.age_S[ready] - self.lag >= self.held_S[ready]
            if self.commits:
                ready = ready[durable]
            self.delivered_before_durable += 0 if self.commits else int((~durable).sum())
        else:  # nothing is ever durable
            self.delivered_before_durable += len(ready)
        self.done_at_S[ready] = self.clock

    def _lose(self, lost: Ints, worker_S: Ints) -> None:
        if not len(lost):
            return
        self.interruptions_S[lost] += 1
        self.failure_S[lost] = self.clock * (int(worker_S[-1]) + 1) + worker_S[lost]
        match self.policy:
            case Drop():
                # The true length is known in a simulation: the first noise below the end hazard.
                ends = self.noise_SL[lost] < self.end_PL[self.prompt_S[lost], 1:]
                self.held_S[lost] = ends.argmax(axis=1) + 1
                self.reason_S[lost] = "interrupted"
                self.done_at_S[lost] = self.clock
                return
            case Truncate():
                self.done_at_S[lost] = self.clock
                return
            case Resume():
                kept = self.kept_S[lost] + np.maximum(self.age_S[lost] - self.lag, 0)
            case _:
                kept = np.zeros(len(lost), dtype=np.int64)
        self.recomputed_S[lost] += self.held_S[lost] - kept
        self.kept_S[lost] = self.held_S[lost] = kept
        self.age_S[lost] = 0
        self.ended_S[lost] = False
        if getattr(self.policy, "noise", "fresh") == "fresh":
            self.noise_SL[lost] = self.rng.random((len(lost), self.noise_SL.shape[1]), dtype=np.float32)

    def _count(self, active: Ints, stratum: Ints, ended: NDArray[np.bool_], lost: Ints, exposed_to_clock: Ints) -> None:
        """Exposure of this step: whoever was lost or could have been. What left by being delivered could not."""
        if not isinstance(self.policy, Resume):
            return
        at_risk = np.isin(active, exposed_to_clock, assume_unique=True) | np.isin(active, lost, assume_unique=True)
        gone = np.isin(active, lost, assume_unique=True)
        for row, group in enumerate((~ended, ended)):
            np.add.at(self.counts[2 * row], stratum[at_risk & group], 1)
            np.add.at(self.counts[2 * row + 1], stratum[gone & group], 1)


def _join(waves: list[_Wave], per_worker: int) -> RolloutTable:
    sizes = [len(w.prompt_S) for w in waves]
    begun_at = np.concatenate([[0], np.cumsum([w.clock for w in waves])[:-1]])
    workers = np.concatenate([[0], np.cumsum([-(-n // per_worker) for n in sizes])[:-1]])
    failure_base = np.concatenate([[0], np.cumsum([(w.failure_S.max(initial=0) + 1) for w in waves])[:-1]])
    start = np.repeat(begun_at, sizes).astype(np.float64)
    end = np.concatenate([w.done_at_S for w in waves])
    failures = [np.where(w.failure_S < 0, -1, w.failure_S + base) for w, base in zip(waves, failure_base)]
    return RolloutTable(
        prompt_N=np.concatenate([w.prompt_S for w in waves]),
        length_N=np.concatenate([w.held_S for w in waves]),
        interruptions_N=np.concatenate([w.interruptions_S for w in waves]),
        reason_N=np.concatenate([w.reason_S for w in waves]).astype(str),
        worker_N=np.concatenate([np.arange(n) // per_worker + base for n, base in zip(sizes, workers)]),
        failure_N=np.concatenate(failures),
        start_N=start,
        end_N=start + end,
        recomputed_N=np.concatenate([w.recomputed_S for w in waves]),
    )


def _censor(table: RolloutTable, dropped_N: NDArray[np.bool_], reason: str) -> RolloutTable:
    reasons = table.reason_N.astype(object)
    reasons[dropped_N & table.delivered_N] = reason
    return replace(table, reason_N=reasons.astype(str))


def _steps_taken(table: RolloutTable) -> NDArray[np.float64]:
    assert table.start_N is not None
    assert table.end_N is not None
    return table.end_N - table.start_N


def _keep_first(table: RolloutTable, policy: KeepFirst, rng: np.random.Generator) -> RolloutTable:
    """Groups of `of` consecutive rollouts; a last, incomplete group is left out whole."""
    groups = len(table) // policy.of
    table = table.select(np.arange(len(table)) < groups * policy.of)
    took_GO = _steps_taken(table).reshape(groups, policy.of) + rng.random((groups, policy.of))
    rank_GO = took_GO.argsort(axis=1).argsort(axis=1)
    return _censor(table, (rank_GO >= policy.keep).ravel(), "not among the first")


def _evict(table: RolloutTable, policy: Evict, rng: np.random.Generator) -> RolloutTable:
    """The attempt that finished was sampled without a break, beginning anywhere between two policy versions."""
    offset_N = rng.integers(policy.version_every, size=len(table))
    span_N = (offset_N + table.length_N - 1) // policy.version_every
    return _censor(table, span_N > policy.span, "stale")
