"""Showing that there is no bias: two one-sided tests, and how many rollouts they need.

Failing to find a difference shows nothing. Equivalence is shown when the whole confidence interval of the difference
lies within a margin that was stated beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .clusters import Arm, ClusterHistograms, cluster_variance, mean_influence, quantiles
from .extra import stats


@dataclass(frozen=True, slots=True)
class Estimate:
    """A difference (treated less reference) with its uncertainty, and both tests of it.

    Args:
        what: the statistic, in words.
        difference: in the unit of the statistic.
        standard_error: robust to clustering.
        ci_low, ci_high: the interval at confidence 1 - 2 alpha, which decides the two one-sided tests at level alpha.
        margin: half the width of what counts as equivalent, same unit.
        p_equivalence: of the two one-sided tests; small shows equivalence.
        p_difference: two-sided; small shows a difference.
        equivalent: whether equivalence is shown at level alpha.
    """

    what: str
    difference: float
    standard_error: float
    ci_low: float
    ci_high: float
    margin: float
    p_equivalence: float
    p_difference: float
    equivalent: bool


def two_one_sided(
    what: str, difference: float, standard_error: float, freedom: float, *, margin: float, alpha: float
) -> Estimate:
    """Both one-sided t tests of |difference| >= margin, as one estimate."""
    if standard_error <= 0:  # no spread at all, as when every rollout has the same length
        inside = abs(difference) < margin
        different = 0.0 if difference else 1.0
        return Estimate(
            what, difference, 0.0, difference, difference, margin, 0.0 if inside else 1.0, different, inside
        )
    reach = float(stats.t.ppf(1 - alpha, freedom)) * standard_error
    p_low = float(stats.t.sf((difference + margin) / standard_error, freedom))
    p_high = float(stats.t.sf((margin - difference) / standard_error, freedom))
    p_difference = 2 * float(stats.t.sf(abs(difference) / standard_error, freedom))
    p = max(p_low, p_high)
    return Estimate(
        what, difference, standard_error, difference - reach, difference + reach, margin, p, p_difference, p < alpha
    )


def mean_difference(
    treated: Arm, reference: Arm | float, *, margin: float, alpha: float = 0.05, what: str = "mean length"
) -> Estimate:
    """The difference of means against another arm or against a known mean. `margin` is in the unit of the values."""
    other, mean = (None, reference) if isinstance(reference, float) else (reference, reference.mean)
    influence, clusters = mean_influence(treated, other)
    variance, freedom = cluster_variance(influence, clusters)
    difference = treated.mean - mean
    return two_one_sided(what, difference, math.sqrt(variance), freedom, margin=margin, alpha=alpha)


def quantile_differences(
    histograms: ClusterHistograms,
    levels: tuple[float, ...],
    *,
    margin: float,
    alpha: float,
    replicates: int,
    rng: np.random.Generator,
) -> list[Estimate]:
    """Differences of quantiles, with standard errors from a cluster bootstrap. `margin` is in tokens."""
    treated_BV, reference_BV = histograms.resampled(replicates, rng)
    treated, reference = (np.cumsum(pmf)[None, :] for pmf in histograms.pmfs())
    out = []
    for level in levels:
        difference = float(quantiles(treated, level)[0] - quantiles(reference, level)[0])
        spread_B = quantiles(treated_BV, level) - quantiles(reference_BV, level)
        spread = float(np.std(spread_B, ddof=1)) * histograms.widening
        what = f"{level:.0%} quantile"
        out.append(two_one_sided(what, difference, spread, histograms.freedom, margin=margin, alpha=alpha))
    return out


def rollouts_needed(
    variance: float,
    *,
    margin: float,
    power: float = 0.9,
    alpha: float = 0.05,
    design_effect: float = 1.0,
    arms: int = 1,
) -> int:
    """Rollouts per arm for which two one-sided tests show equivalence with this probability if there is no bias at all.

    Args:
        variance: of one rollout's length, from a pilot.
        margin: in tokens.
        design_effect: by how much clustering inflates the variance of the mean, from a pilot.
        arms: 1 against a known mean, 2 against another sample of the same size.
    """
    # Both one-sided tests must succeed, so each may fail with half of 1 - power.
    quantile = float(stats.norm.ppf(1 - alpha) + stats.norm.ppf((1 + power) / 2))
    return max(2, math.ceil(arms * design_effect * variance * (quantile / margin) ** 2))


def power_of(standard_error: float, *, margin: float, alpha: float = 0.05) -> float:
    """The probability that two one-sided tests of an estimate with this error show equivalence if there is no bias."""
    reach = margin / standard_error - float(stats.norm.ppf(1 - alpha)) if standard_error > 0 else math.inf
    return max(0.0, 2 * float(stats.norm.cdf(reach)) - 1)
