"""The audit's inference: its error rates, its clusters, and what others compute for the same data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rollout_wal.audit.clusters import Arm, ClusterHistograms, cluster_variance, design_effect, quantiles
from rollout_wal.audit.compare import Settings, compare
from rollout_wal.audit.difference import benjamini_hochberg, distribution_tests, holm, kolmogorov_smirnov, mix_tests
from rollout_wal.audit.effects import effects
from rollout_wal.audit.equivalence import mean_difference, power_of, rollouts_needed, two_one_sided
from rollout_wal.audit.lengths import LengthDistribution
from rollout_wal.audit.report import Audit
from rollout_wal.audit.table import RolloutTable
from rollout_wal.errors import AuditError

LAW = LengthDistribution.uniform(1, 100)


def rows(n: int, base: int = 0) -> np.ndarray:
    return np.arange(base, base + n, dtype=np.int64)


def table(length: np.ndarray, prompt: np.ndarray | None = None, **more: np.ndarray) -> RolloutTable:
    n = len(length)
    return RolloutTable(
        prompt_N=rows(n) if prompt is None else prompt,
        length_N=np.asarray(length),
        interruptions_N=np.zeros(n, dtype=np.int64),
        reason_N=np.full(n, ""),
        extras=more,
    )


def test_two_one_sided_tests_are_welch_tests_at_the_margins() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(10, 2, 500), rng.normal(10.05, 2, 500)
    estimate = mean_difference(Arm(a, (rows(500),)), Arm(b, (rows(500, 500),)), margin=0.4)
    low = stats.ttest_ind(a + 0.4, b, alternative="greater", equal_var=False).pvalue
    high = stats.ttest_ind(a - 0.4, b, alternative="less", equal_var=False).pvalue
    assert estimate.p_equivalence == pytest.approx(max(low, high), rel=0.02)
    assert estimate.p_difference == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=0.02)
    assert estimate.equivalent == (estimate.ci_low > -0.4 and estimate.ci_high < 0.4)


def test_equivalence_is_falsely_shown_as_often_as_the_level_says() -> None:
    """At a bias of exactly the margin, the worst case, with prompts that share most of their variance."""
    rng = np.random.default_rng(1)
    shown = 0
    for _ in range(1000):
        prompt = np.repeat(rows(40), 8)
        value = 50 + 2.0 + rng.normal(0, 3, 40)[prompt] + rng.normal(0, 2, 320)
        shown += mean_difference(Arm(value, (prompt,)), 50.0, margin=2.0).equivalent
    assert 0.03 < shown / 1000 < 0.075


def test_ignoring_the_clusters_would_be_wrong() -> None:
    """The same data with every row as its own cluster: the level is missed by far, so the clusters do something."""
    rng = np.random.default_rng(1)
    shown = 0
    for _ in range(300):
        prompt = np.repeat(rows(40), 8)
        value = 50 + 2.0 + rng.normal(0, 3, 40)[prompt] + rng.normal(0, 2, 320)
        shown += mean_difference(Arm(value, (rows(320),)), 50.0, margin=2.0).equivalent
    assert shown / 300 > 0.12


def test_the_planned_number_of_rollouts_gives_the_planned_power() -> None:
    rng = np.random.default_rng(2)
    n = rollouts_needed(LAW.variance, margin=1.0, power=0.9)
    assert power_of((LAW.variance / n) ** 0.5, margin=1.0) == pytest.approx(0.9, abs=0.001)
    shown = sum(
        mean_difference(Arm(rng.integers(1, 101, n).astype(float), (rows(n),)), LAW.mean, margin=1.0).equivalent
        for _ in range(300)
    )
    assert 0.84 < shown / 300 < 0.95


def test_two_way_clusters_add_and_subtract() -> None:
    influence = np.array([1.0, 2.0, -1.0, 3.0, 2.0, 1.0])
    one, two = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 0, 1, 3])
    by_one = 3 / 2 * (3**2 + 2**2 + 3**2)
    # Clusters 0 and 1 of the second way hold rows of two clusters of the first each.
    variance, freedom = cluster_variance(influence, (one, two))
    assert variance == pytest.approx(by_one + 2 * (2 * 1 * 3 + 2 * 2 * 2))
    assert 1 <= freedom <= 2
    # What the second way adds may be estimated as less than nothing; alone in their clusters, rows add nothing.
    assert cluster_variance(influence * [1, 1, 1, -1, 1, 1], (one, np.array([0, 1, 2, 0, 3, 4])))[0] == pytest.approx(
        3 / 2 * (3**2 + 4**2 + 3**2)
    )
    assert cluster_variance(influence, (one, np.arange(6)))[0] == pytest.approx(by_one)


def test_pairing_by_prompt_removes_what_the_arms_share() -> None:
    rng = np.random.default_rng(3)
    prompt = np.repeat(rows(50), 4)
    shared = rng.normal(0, 10, 50)[prompt]
    a, b = shared + rng.normal(0, 1, 200), shared + rng.normal(0, 1, 200)
    paired = mean_difference(Arm(a, (prompt,)), Arm(b, (prompt,)), margin=1.0)
    apart = mean_difference(Arm(a, (prompt,)), Arm(b, (prompt + 1000,)), margin=1.0)
    assert paired.standard_error < 0.2
    assert apart.standard_error > 1.0
    assert design_effect(Arm(a, (prompt,))) > 3


def of_prompts(
    rng: np.random.Generator, centre_P: np.ndarray, copies: int, *, first: int = 0, lives: int = 0, spread: float = 0.0
) -> RolloutTable:
    """Lengths around each prompt's own centre. Half of the rows were hit in one of the lives, and move alike."""
    prompt = np.repeat(rows(len(centre_P)), copies)
    life = np.where(rng.random(len(prompt)) < 0.5, rng.integers(0, max(lives, 1), len(prompt)), -1)
    moved = np.where(life >= 0, rng.normal(0, spread, max(lives, 1))[life], 0)
    lengths = np.maximum(rng.normal(centre_P[prompt] + moved, 20).round(), 1).astype(np.int64)
    return replace(table(lengths, prompt + first), failure_N=life if lives else None)


def test_prompts_that_both_arms_share_cancel_in_the_comparison() -> None:
    """100 prompts of very different lengths: their differences are in no error, so few rollouts show equivalence."""
    rng = np.random.default_rng(11)
    settings = Settings(margin=0.03, quantile_margin=0.08, replicates=199)
    measured = []
    for _ in range(60):
        centre = rng.uniform(40, 160, 100)
        measured.append(compare("x", of_prompts(rng, centre, 16), of_prompts(rng, centre, 16), settings=settings))
    differences = [m.mean_estimate.difference for m in measured]
    assert np.mean([m.mean_estimate.standard_error for m in measured]) == pytest.approx(np.std(differences), rel=0.15)
    assert np.mean([m.verdict == "equivalent" for m in measured]) > 0.9
    assert np.mean([m.verdict == "biased" for m in measured]) <= 0.05


@pytest.mark.parametrize(("lives", "spread", "runs"), [(50, 0.0, 300), (15, 5.0, 300), (15, 15.0, 80)])
def test_shared_failures_are_not_lost_where_prompts_cancel(lives: int, spread: float, runs: int) -> None:
    """Without a bias, no test finds a difference more often than its level says, few failures or many."""
    rng = np.random.default_rng(12)
    found = np.zeros(3)
    for _ in range(runs):
        centre = rng.uniform(60, 140, 60)
        hit = of_prompts(rng, centre, 8, lives=lives, spread=spread)
        measured = compare("x", hit, of_prompts(rng, centre, 8), settings=Settings(replicates=99, quantiles=(0.5,)))
        found += [t.p_value < 0.05 for t in measured.tests]
    assert (found / runs < 0.085).all(), found


def test_few_clusters_keep_the_level_of_every_test() -> None:
    """Ten prompts against a known law: how far they differ is known badly, and that is part of the error."""
    rng = np.random.default_rng(13)
    many = of_prompts(rng, rng.uniform(40, 160, 200_000), 1)
    law = LengthDistribution.from_lengths(many.length_N)
    found = np.zeros(3)
    for _ in range(300):
        measured = compare("x", of_prompts(rng, rng.uniform(40, 160, 10), 40), law, settings=Settings(replicates=199))
        found += [t.p_value < 0.05 for t in measured.tests]
    assert (found / 300 < 0.06).all(), found


def test_few_prompts_that_are_not_the_same_give_no_verdict() -> None:
    rng = np.random.default_rng(14)
    centre = np.array([60.0, 80.0, 120.0, 140.0])
    one = of_prompts(rng, centre, 200)
    other = compare("x", one, of_prompts(rng, centre - 30, 200, first=4))
    assert other.verdict == "inconclusive"
    assert "cannot be told from a bias" in other.notes[0]
    assert other.to_json()["notes"] == list(other.notes)
    page = Audit("Few prompts", "", (other,), Settings()).page().html()
    assert other.notes[0] in page
    assert all(heading in page for heading in ("needed (mean)", "power (mean)"))
    # The same prompts, or so many that they can stand for others, are compared.
    same = compare("x", one, of_prompts(rng, centre - 30, 200))
    assert (same.verdict, same.notes) == ("biased", ())
    assert compare("x", of_prompts(rng, centre, 200), one, settings=Settings(margin=0.1)).notes == ()
    # Different numbers of each by chance are what independent rows make.
    drawn = [rng.integers(0, 4, 800) for _ in range(2)]
    assert compare("x", *(table(rng.integers(1, 101, 800), prompt) for prompt in drawn)).notes == ()


def test_the_power_is_that_of_the_arms_there_are() -> None:
    """A small reference decides, however many rollouts were interrupted."""
    rng = np.random.default_rng(15)
    hit, calm = table(rng.integers(1, 101, 20_000)), table(rng.integers(1, 101, 800), rows(800, 20_000))
    measured = compare("x", hit, calm, settings=Settings(margin=0.05, replicates=19, quantiles=(0.5,)))
    shown = [
        mean_difference(
            Arm(rng.integers(1, 101, 20_000).astype(float), (rows(20_000),)),
            Arm(rng.integers(1, 101, 800).astype(float), (rows(800, 20_000),)),
            margin=0.05 * LAW.mean,
        ).equivalent
        for _ in range(300)
    ]
    assert measured.power == pytest.approx(np.mean(shown), abs=0.07)
    assert measured.power < 0.7


def test_distribution_tests_agree_with_scipy_on_independent_rows() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(1, 1001, 800), rng.integers(1, 1041, 800)
    arms = [Arm(x.astype(float), (rows(800, base),)) for x, base in ((a, 0), (b, 800))]
    histograms = ClusterHistograms.build(arms[0], arms[1], rng=rng)
    ks, ad = distribution_tests(histograms, replicates=4000, rng=rng)
    expected = stats.ks_2samp(a, b, method="asymp")
    assert ks.statistic == pytest.approx(expected.statistic)
    assert ks.p_value == pytest.approx(expected.pvalue, abs=0.06)
    method = stats.PermutationMethod(n_resamples=499, rng=5)
    anderson = stats.anderson_ksamp([a, b], variant="midrank", method=method)
    assert ad.p_value == pytest.approx(anderson.pvalue, abs=0.06)


def test_distribution_tests_keep_their_level_with_clusters() -> None:
    rng = np.random.default_rng(5)
    alarms = np.zeros(2)
    for _ in range(200):
        arms = []
        for base in (0, 1000):
            prompt = np.repeat(rows(60, base), 6)
            centre = rng.integers(10, 60, 60)[prompt - base]
            arms.append(Arm((centre + rng.integers(0, 20, 360)).astype(float), (prompt,)))
        histograms = ClusterHistograms.build(arms[0], arms[1], rng=rng)
        alarms += [t.p_value < 0.05 for t in distribution_tests(histograms, replicates=199, rng=rng)]
    assert (alarms / 200 < 0.1).all()
    assert (alarms > 0).any()


def test_distribution_tests_see_a_change_of_shape_that_the_mean_hides() -> None:
    rng = np.random.default_rng(6)
    narrow = np.clip(rng.normal(50, 5, 600), 1, 99).round()
    wide = np.clip(rng.normal(50, 15, 600), 1, 99).round()
    arms = [Arm(x, (rows(600, base),)) for x, base in ((narrow, 0), (wide, 600))]
    ks, ad = distribution_tests(ClusterHistograms.build(arms[0], arms[1], rng=rng), replicates=499, rng=rng)
    assert ks.p_value < 0.01
    assert ad.p_value < 0.01
    assert ks.statistic == pytest.approx(stats.ks_2samp(narrow, wide).statistic)


def test_quantiles_of_a_known_law() -> None:
    cumulative = np.cumsum(LAW.pmf_L)[None, :]
    for level in (0.1, 0.5, 0.905):
        assert quantiles(cumulative, level)[0] == pytest.approx(100 * level)


def test_corrections_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.0533333, 0.0533333, 0.5], rel=1e-5)


def test_effects_by_hand() -> None:
    one = LengthDistribution.normalised([0, 0.5, 0.5])
    two = LengthDistribution.normalised([0, 0.25, 0.75])
    e = effects(one, two)
    assert e.relative == pytest.approx(-0.25 / 1.75)
    assert e.wasserstein == pytest.approx(0.25)
    assert e.superiority == pytest.approx(0.5 * 0.25 + 0.5 * (0.5 * 0.25 + 0.5 * 0.75))
    assert kolmogorov_smirnov(one.pmf_L, two.pmf_L) == pytest.approx(0.25)
    assert mix_tests({"a": 50, "b": 50}, {"a": 90, "b": 10}).p_value < 1e-6
    assert mix_tests({"a": 50}, {"a": 90}).p_value == 1.0


def test_no_spread_is_no_crash() -> None:
    same = two_one_sided("x", 0.0, 0.0, 5, margin=1.0, alpha=0.05)
    assert same.equivalent
    assert same.p_difference == 1.0
    law = LengthDistribution.uniform(7, 7)
    assert compare("constant", table(np.full(50, 7)), law).verdict == "equivalent"


@pytest.mark.parametrize(
    ("shift", "n", "verdict"), [(0, 20_000, "equivalent"), (5, 20_000, "biased"), (0, 60, "inconclusive")]
)
def test_verdicts_against_a_known_law(shift: int, n: int, verdict: str) -> None:
    lengths = np.random.default_rng(7).integers(1 + shift, 101 + shift, n)
    measured = compare("x", table(lengths), LAW, settings=Settings(margin=0.03, quantile_margin=0.06))
    assert measured.verdict == verdict
    assert (measured.rollouts_needed > n) == (verdict == "inconclusive")


def test_a_tiny_but_certain_difference_within_the_margin_is_equivalent() -> None:
    lengths = np.random.default_rng(8).integers(2, 102, 200_000)  # one token longer: 2 % of the mean
    measured = compare("x", table(lengths), LAW, settings=Settings(margin=0.03, quantile_margin=0.06))
    assert measured.verdict == "equivalent"
    assert measured.mean_estimate.p_difference < 1e-9


def test_further_metrics_are_compared_and_corrected_together() -> None:
    rng = np.random.default_rng(9)
    n = 3000
    reward = rng.normal(0, 1, n)
    reward[::7] = np.nan  # missing is left out, never counted as a number
    calm = table(rng.integers(1, 101, n), reward=reward, domain=np.where(rng.random(n) < 0.5, "math", "code"))
    hit = table(
        rng.integers(1, 101, n), reward=rng.normal(0.4, 1, n), domain=np.where(rng.random(n) < 0.2, "math", "code")
    )
    measured = compare("x", hit, calm)
    names = {t.name: t for t in measured.tests}
    assert names["mean reward (t)"].p_corrected < 1e-6
    assert names["domain (mix)"].p_corrected < 1e-6
    assert names["Kolmogorov–Smirnov"].p_corrected > 0.05
    assert not measured.metric_estimates[0].equivalent
    assert all(t.p_corrected >= t.p_value for t in measured.tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length_N": np.array([1, 0, 3])}, "row 1 is a delivered rollout of length below 1"),
        ({"prompt_N": np.array([1, 2])}, "differ in length"),
        ({"interruptions_N": np.array([0, -1, 0])}, "negative number of interruptions"),
        ({"reason_N": np.array(["lost", "lost", "lost"])}, "every rollout of the table was censored"),
    ],
)
def test_tables_that_are_none(change: dict[str, np.ndarray], message: str) -> None:
    columns = {
        "prompt_N": rows(3),
        "length_N": np.array([1, 2, 3]),
        "interruptions_N": np.zeros(3, dtype=np.int64),
        "reason_N": np.full(3, ""),
    }
    with pytest.raises(AuditError, match=message):
        RolloutTable(**(columns | change))
