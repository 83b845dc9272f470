"""Showing that there is a bias: distribution tests that respect clusters and ties, corrected for many comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .clusters import ClusterHistograms
from .extra import stats
from .lengths import Floats


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test: its statistic, its p value, and the p value corrected for all tests of the comparison (Holm)."""

    __test__ = False  # pytest would collect a class of this name

    name: str
    statistic: float
    p_value: float
    p_corrected: float = 1.0


def kolmogorov_smirnov(treated_V: Floats, reference_V: Floats) -> float:
    """The largest distance between the two cumulative laws."""
    return float(np.abs(np.cumsum(treated_V) - np.cumsum(reference_V)).max())


def anderson_darling(treated_V: Floats, reference_V: Floats, *, share: float = 0.5) -> float:
    """The squared distance of the cumulative laws, weighted so that the tails count: sum of D² h / (H (1 - H)).

    h and H are of the pool, in which the treated arm has this share.
    """
    return float((np.cumsum(treated_V) - np.cumsum(reference_V)) ** 2 @ _tail_weight(treated_V, reference_V, share))


def _tail_weight(treated_V: Floats, reference_V: Floats, share: float) -> Floats:
    pool = share * treated_V + (1 - share) * reference_V
    below = np.cumsum(pool)
    spread = below * (1 - below)
    return np.divide(pool, spread, out=np.zeros_like(pool), where=spread > 1e-12)


def distribution_tests(
    histograms: ClusterHistograms, *, replicates: int, rng: np.random.Generator
) -> tuple[TestResult, TestResult]:
    """Kolmogorov–Smirnov and Anderson–Darling.

    The textbook p values assume independent rows and no ties. Here the null law comes from a multiplier bootstrap: each
    cluster's share in the difference of the cumulative laws is multiplied by an independent random number.
    """
    treated, reference = histograms.pmfs()
    influence_GV = histograms.cumulative_influence()
    noise_BG = rng.standard_normal((replicates, len(influence_GV)))
    # How far clusters differ is itself estimated: t distributed noise, as in the test of the mean.
    noise_BG *= np.sqrt(histograms.freedom / rng.chisquare(histograms.freedom, (replicates, 1)))
    null_BV = noise_BG @ influence_GV
    share = 0.5
    if histograms.reference_GV is not None:
        rows = histograms.treated_GV.sum()
        share = float(rows / (rows + histograms.reference_GV.sum()))
    weight = _tail_weight(treated, reference, share)
    largest = kolmogorov_smirnov(treated, reference)
    squared = anderson_darling(treated, reference, share=share)

    def p_value(statistic: float, null_B: Floats) -> float:
        # A relative tolerance: with few clusters a replicate may reproduce the statistic but for rounding.
        return float((1 + (null_B >= statistic * (1 - 1e-9)).sum()) / (replicates + 1))

    return (
        TestResult("Kolmogorov–Smirnov", largest, p_value(largest, np.abs(null_BV).max(axis=1))),
        TestResult("Anderson–Darling", squared, p_value(squared, null_BV**2 @ weight)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of even one false alarm stays below the level."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1.0)
    return [float(x) for x in out]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """The false discovery rate: for looking through many metrics, where a few false alarms are acceptable."""
    return [float(x) for x in stats.false_discovery_control(np.asarray(p_values, dtype=np.float64), method="bh")]


def corrected(tests: Sequence[TestResult]) -> list[TestResult]:
    """The same tests, each with its Holm-corrected p value."""
    adjusted = holm([t.p_value for t in tests])
    return [TestResult(t.name, t.statistic, t.p_value, p) for t, p in zip(tests, adjusted)]


def mix_tests(treated: Mapping[str, int], reference: Mapping[str, int]) -> TestResult:
    """Whether a categorical column (the domain, say) is mixed differently: a chi-squared test of the counts.

    Rows are taken as independent: with many rollouts per prompt it sees differences too readily.
    """
    names = sorted(set(treated) | set(reference))
    counts = np.array([[treated.get(n, 0) for n in names], [reference.get(n, 0) for n in names]])
    if len(names) < 2:
        return TestResult("mix", 0.0, 1.0)
    result = stats.chi2_contingency(counts)
    return TestResult("mix", float(result.statistic), float(result.pvalue))
