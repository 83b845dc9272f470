"""The simulated mechanism against the exact laws. The seeds are fixed: what passed once does not fail by chance."""

from __future__ import annotations

import numpy as np
import pytest

from rollout_wal.audit.equivalence import rollouts_needed
from rollout_wal.audit.hypotheses import closed_cohort, independent_loss, output_commit, single_noise
from rollout_wal.audit.lengths import LengthDistribution
from rollout_wal.audit.policies import Drop, Evict, KeepFirst, Policy, Restart, Resume, Truncate
from rollout_wal.audit.schedules import (
    Interruptions,
    bursts,
    constant,
    finishing_kills,
    never,
    once,
    out_of_memory,
    periodic,
    spot,
)
from rollout_wal.audit.simulate import simulate
from rollout_wal.audit.theory import predict, predict_mixture

LAW = LengthDistribution.uniform(1, 60)
ROLLOUTS = 30_000


def agree(process: Interruptions, policy: Policy) -> None:
    """Mean and every tenth of the law within 4.5 standard errors; costs within a few per cent."""
    prediction = predict(LAW, process, policy)
    table = simulate(LAW, process, policy, rollouts=ROLLOUTS, seed=11).table
    lengths = table.delivered().length_N
    n = len(lengths)
    assert n / len(table) == pytest.approx(prediction.delivered, abs=4.5 * 0.5 / ROLLOUTS**0.5)
    error = (prediction.accepted.variance / n) ** 0.5
    assert abs(lengths.mean() - prediction.accepted.mean) < 4.5 * error
    cumulative = np.clip(np.cumsum(prediction.accepted.padded(LAW.longest)), 0, 1)
    for cut in range(6, 60, 6):
        p = cumulative[cut]
        assert abs((lengths <= cut).mean() - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-12
    if prediction.recomputed and not isinstance(policy, Drop | Truncate):
        assert table.recomputed_N is not None
        assert table.recomputed_N.mean() == pytest.approx(prediction.recomputed, rel=0.08)


@pytest.mark.parametrize(
    "process",
    [
        constant(0.02),
        once(30),
        periodic(40),
        bursts(80, 15, 0.1),
        spot(0.02, 10),
        out_of_memory(30, 0.05),
        finishing_kills(0.2),
    ],
    ids=lambda p: p.label,
)
@pytest.mark.parametrize(
    "policy", [Restart(), Drop(), Truncate(), Resume(8, "early"), Resume(8, "commit")], ids=lambda p: p.name
)
def test_simulation_and_theory_agree(process: Interruptions, policy: Policy) -> None:
    agree(process, policy)


@pytest.mark.parametrize(
    ("process", "policy"),
    [
        (constant(0.02), Restart("keyed")),
        (constant(0.02), Resume(8, "early", "keyed")),
        (constant(0.02), KeepFirst(3, 5)),
        (never(), KeepFirst(1, 4)),
        (constant(0.02), Evict(1, 25)),
        (once(20), Resume(0, "commit", "reused")),
        (periodic(25), Resume(4, "early", "reused")),
    ],
    ids=lambda x: getattr(x, "name", getattr(x, "label", "")),
)
def test_the_rarer_policies_agree_too(process: Interruptions, policy: Policy) -> None:
    agree(process, policy)


def test_whole_workers_change_the_evidence_but_not_the_law() -> None:
    alone = simulate(LAW, constant(0.02), Restart(), rollouts=ROLLOUTS, seed=1).table
    together = simulate(LAW, constant(0.02, slots_per_worker=32), Restart(), rollouts=ROLLOUTS, seed=1).table
    error = (LAW.variance / ROLLOUTS) ** 0.5
    assert abs(alone.length_N.mean() - together.length_N.mean()) < 6 * error
    assert together.failure_N is not None
    hit = together.failure_N[together.failure_N >= 0]
    assert len(hit) / len(np.unique(hit)) > 3  # failures are shared


def test_keyed_noise_reproduces_every_rollout() -> None:
    calm = simulate(LAW, never(), Resume(0, "commit", "keyed"), rollouts=2000, seed=5, slots=512).table
    hit = simulate(LAW, once(20), Resume(5, "commit", "keyed"), rollouts=2000, seed=5, slots=512).table
    assert hit.interruptions_N.sum() > 1000
    np.testing.assert_array_equal(calm.length_N, hit.length_N)


def test_prompts_are_tilted_one_by_one() -> None:
    laws = [LengthDistribution.uniform(1, 20), LengthDistribution.uniform(41, 60)]
    table = simulate(laws, constant(0.03), Restart(), rollouts=ROLLOUTS, seed=2).table
    prediction = predict_mixture(laws, constant(0.03), Restart())
    assert np.bincount(table.prompt_N).tolist() == [ROLLOUTS // 2, ROLLOUTS // 2]
    assert table.length_N.mean() == pytest.approx(prediction.accepted.mean, abs=0.5)


def test_what_never_finishes_is_censored_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_wal.audit.simulate.STEPS_MAX", 500)
    table = simulate(LAW, periodic(30, phase="aligned"), Restart("keyed"), rollouts=1000, seed=0).table
    assert set(table.reason_N.tolist()) == {"", "never finished"}
    assert table.delivered().length_N.max() == 30
    assert table.censored()["never finished"].rollouts == 1000 - int(table.delivered_N.sum())


def test_hypotheses_see_what_was_built_in() -> None:
    def verdicts(process: Interruptions, policy: Policy) -> list[bool | None]:
        run = simulate(LAW, process, policy, rollouts=20_000, seed=3)
        checks = [
            output_commit(run.delivered_before_durable),
            closed_cohort(run.table, begun=len(run.table)),
            independent_loss(run.exposure),
            single_noise(run.noise_reused),
        ]
        return [c.held for c in checks]

    assert verdicts(constant(0.02), Resume(8, "commit")) == [True, True, True, True]
    # Where the hazard depends on the clock, what has ended is of another age than what goes on, at the same position.
    for process in (periodic(25), bursts(40, 10, 0.15), bursts(40, 10, 0.15, calm=0.005)):
        assert verdicts(process, Resume(8, "commit")) == [True, True, True, True], process.label
    # All are lost at one moment, whatever they hold: nothing to compare.
    assert verdicts(once(30), Resume(8, "commit")) == [True, True, None, True]
    assert verdicts(constant(0.02), Resume(8, "early")) == [False, True, None, True]
    assert verdicts(constant(0.02), Restart()) == [False, True, None, True]
    assert verdicts(finishing_kills(0.2), Resume(8, "commit")) == [True, True, False, True]
    assert verdicts(out_of_memory(30, 0.05), Resume(8, "commit")) == [True, True, False, True]
    assert verdicts(constant(0.02), Resume(0, "commit", "reused"))[3] is False
    assert verdicts(constant(0.02), Drop())[1] is False


def test_rollouts_that_are_missing_break_the_cohort() -> None:
    table = simulate(LAW, never(), Restart(), rollouts=100, seed=0).table
    assert closed_cohort(table, begun=103).check == "103 begun, 100 delivered, 3 unaccounted for"
    assert closed_cohort(table, begun=None).held is None


def test_the_number_needed_is_the_number_of_the_textbook() -> None:
    # 90 % power of two one-sided tests at 5 %: (1.6449 + 1.6449)² σ² / δ²
    assert rollouts_needed(100.0, margin=1.0) == pytest.approx(100 * (2 * 1.6448536) ** 2, abs=1)
    assert rollouts_needed(100.0, margin=1.0, arms=2, design_effect=3.0) == pytest.approx(
        6 * rollouts_needed(100.0, margin=1.0), abs=6
    )
