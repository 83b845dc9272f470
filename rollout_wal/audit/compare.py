"""One comparison: what a backend delivered under interruptions against what it ought to deliver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .clusters import PROMPTS_MIN, Arm, ClusterHistograms, arms, design_effect, within_clusters
from .difference import TestResult, benjamini_hochberg, corrected, distribution_tests, mix_tests
from .effects import Effects, compounded, effects
from .equivalence import Estimate, mean_difference, power_of, quantile_differences, rollouts_needed
from .hypotheses import Hypothesis
from .lengths import Floats, LengthDistribution
from .table import Censored, RolloutTable
from .theory import Prediction

Verdict = Literal["equivalent", "biased", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What was decided before looking at the data.

    Args:
        margin: bias of the mean that counts as none, as a fraction of the reference mean.
        quantile_margin: the same for quantiles, also as a fraction of the reference *mean*; they are noisier.
        alpha: level of every test.
        power: probability with which equivalence of the mean is to be shown where there is no bias.
        quantiles: which are compared.
        metric_margin: for further numeric columns, in standard deviations of the reference.
        compound_steps, compound_rate: see `effects.compounded`.
    """

    margin: float = 0.02
    quantile_margin: float = 0.04
    alpha: float = 0.05
    power: float = 0.9
    quantiles: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    metric_margin: float = 0.1
    replicates: int = 999
    compound_steps: int = 10
    compound_rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """Everything that was found out about one arm. Means and differences are in tokens.

    Args:
        rollouts_needed: per arm, to show equivalence of the mean alone with the power of the settings. Quantiles may
            take more.
        power: with which these rollouts show equivalence of the mean alone where there is no bias.
        predicted_agrees: whether the measured mean is shown to lie within the margin of the predicted one.
        notes: why there is no verdict, where the data could not give one whatever their number.
    """

    name: str
    verdict: Verdict
    rollouts: int
    delivered: int
    interrupted_share: float
    mean: float
    reference_mean: float
    mean_estimate: Estimate
    quantile_estimates: tuple[Estimate, ...]
    metric_estimates: tuple[Estimate, ...]
    tests: tuple[TestResult, ...]
    false_discovery: tuple[float, ...]
    effects: Effects
    design_effect: float
    rollouts_needed: int
    power: float
    censored: dict[str, Censored]
    compounded_mean: tuple[float, ...]
    recomputed_tokens: int | None
    hypotheses: tuple[Hypothesis, ...]
    predicted_mean: float | None
    predicted_agrees: bool | None
    lengths: LengthDistribution
    reference_lengths: LengthDistribution
    prediction: Prediction | None
    notes: tuple[str, ...] = ()

    @property
    def delta_relative(self) -> float:
        return self.mean_estimate.difference / self.reference_mean

    @property
    def interval_relative(self) -> tuple[float, float]:
        """The interval of the bias, as a fraction of the reference mean."""
        return self.mean_estimate.ci_low / self.reference_mean, self.mean_estimate.ci_high / self.reference_mean

    @property
    def predicted_delta_relative(self) -> float | None:
        return None if self.predicted_mean is None else self.predicted_mean / self.reference_mean - 1

    def to_json(self) -> dict[str, Any]:
        """Plain types only. The length laws are left out: they are in the page, and in the caller's data."""
        skipped = {"lengths", "reference_lengths", "prediction", "hypotheses"}
        out = {k: _plain(getattr(self, k)) for k in self.__slots__ if k not in skipped}
        low, high = self.interval_relative
        return out | {
            "hypotheses": [asdict(h) | {"verdict": h.verdict} for h in self.hypotheses],
            "mean_delta_relative": self.delta_relative,
            "ci_low": low,
            "ci_high": high,
            "predicted_delta_relative": self.predicted_delta_relative,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate | TestResult | Effects | Censored):
        return asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def compare(
    name: str,
    treated: RolloutTable,
    reference: RolloutTable | LengthDistribution,
    *,
    settings: Settings | None = None,
    prediction: Prediction | None = None,
    hypotheses: Sequence[Hypothesis] = (),
) -> Comparison:
    """Test the delivered rollouts of `treated` against those of an uninterrupted run, or against a known law.

    The verdict is "equivalent" where equivalence is shown for the mean and for every quantile; else "biased" where a
    difference of the lengths is shown (mean, Kolmogorov–Smirnov or Anderson–Darling, Holm-corrected together with all
    further metrics); else "inconclusive". It is "inconclusive" as well, with a note, where the arms have few prompts
    and not the same ones.
    """
    settings = settings or Settings()
    rng = np.random.default_rng(settings.seed)
    rows = treated.delivered()
    other = None if isinstance(reference, LengthDistribution) else reference.delivered()
    arm, other_arm = arms(rows, other)
    known = reference if isinstance(reference, LengthDistribution) else None
    law = known or LengthDistribution.from_lengths(_lengths(other_arm))
    own_law = LengthDistribution.from_lengths(rows.length_N)
    target: Arm | float = law.mean if other_arm is None else other_arm
    margin = settings.margin * law.mean
    estimate = mean_difference(arm, target, margin=margin, alpha=settings.alpha)
    histograms = ClusterHistograms.build(arm, known or _present(other_arm), rng=rng)
    quantile_estimates = quantile_differences(
        histograms,
        settings.quantiles,
        margin=settings.quantile_margin * law.mean,
        alpha=settings.alpha,
        replicates=settings.replicates,
        rng=rng,
    )
    distribution = distribution_tests(histograms, replicates=settings.replicates, rng=rng)
    standard_score = estimate.difference / estimate.standard_error if estimate.standard_error else 0.0
    length_tests = [TestResult("mean length (t)", standard_score, estimate.p_difference), *distribution]
    metrics, metric_tests = ([], []) if other is None else _metrics(rows, other, arm, _present(other_arm), settings)
    tests = corrected([*length_tests, *metric_tests])
    shown = estimate.equivalent and all(q.equivalent for q in quantile_estimates)
    different = any(t.p_corrected < settings.alpha for t in tests[: len(length_tests)])
    verdict: Verdict = "equivalent" if shown else "biased" if different else "inconclusive"
    notes = () if isinstance(reference, LengthDistribution) else _incomparable(treated, reference, settings)
    if notes:
        verdict = "inconclusive"
    spread = design_effect(arm, other_arm)
    arms_count = 1 if other_arm is None else 2
    return Comparison(
        name=name,
        verdict=verdict,
        rollouts=len(treated),
        delivered=len(rows),
        interrupted_share=treated.interrupted_share,
        mean=arm.mean,
        reference_mean=law.mean,
        mean_estimate=estimate,
        quantile_estimates=tuple(quantile_estimates),
        metric_estimates=tuple(metrics),
        tests=tuple(tests),
        false_discovery=tuple(benjamini_hochberg([t.p_value for t in tests])),
        effects=effects(own_law, law),
        design_effect=spread,
        rollouts_needed=rollouts_needed(
            law.variance,
            margin=margin,
            power=settings.power,
            alpha=settings.alpha,
            design_effect=spread,
            arms=arms_count,
        ),
        power=power_of(estimate.standard_error, margin=margin, alpha=settings.alpha),
        censored=treated.censored(),
        compounded_mean=tuple(
            float(x) for x in compounded(law, own_law, steps=settings.compound_steps, rate=settings.compound_rate)
        ),
        recomputed_tokens=None if treated.recomputed_N is None else int(treated.recomputed_N.sum()),
        hypotheses=tuple(hypotheses),
        predicted_mean=None if prediction is None else prediction.accepted.mean,
        predicted_agrees=None if prediction is None else _agrees(arm, other_arm, law, prediction, margin, settings),
        lengths=own_law,
        reference_lengths=law,
        prediction=prediction,
        notes=notes,
    )


def _incomparable(treated: RolloutTable, reference: RolloutTable, settings: Settings) -> tuple[str, ...]:
    """A note if the arms began different mixes of prompts, and so few that this cannot be told from a bias.

    Mixes that differ by no more than chance are those of rows drawn independently, as `arms` takes them to be.
    """
    counts = [Counter(table.prompt_N.tolist()) for table in (treated, reference)]
    if len(counts[0] | counts[1]) >= PROMPTS_MIN or mix_tests(*counts).p_value >= settings.alpha:
        return ()
    return (f"the arms began different prompts, and fewer than {PROMPTS_MIN}: that cannot be told from a bias",)


def _present(arm: Arm | None) -> Arm:
    assert arm is not None
    return arm


def _lengths(arm: Arm | None) -> Floats:
    return _present(arm).value_N


def _agrees(
    arm: Arm, other: Arm | None, law: LengthDistribution, prediction: Prediction, margin: float, settings: Settings
) -> bool:
    """Whether the measured mean is shown to be within the margin of the predicted one.

    The prediction may itself rest on the reference sample; the error of the difference of the arms covers that to first
    order, so it is used here as well. How much prompts differ in their bias is part of the prediction and no error.
    """
    shift = prediction.accepted.mean - prediction.true.mean
    if other is None:
        return mean_difference(arm, law.mean + shift, margin=margin, alpha=settings.alpha).equivalent
    own, theirs = within_clusters(arm), within_clusters(other)
    moved = Arm(theirs.value_N + shift, theirs.clusters)
    return mean_difference(own, moved, margin=margin, alpha=settings.alpha).equivalent


def _metrics(
    rows: RolloutTable, other: RolloutTable, arm: Arm, other_arm: Arm, settings: Settings
) -> tuple[list[Estimate], list[TestResult]]:
    """Every further column that both tables have: means of numbers, the mix of texts. Missing numbers are left out."""
    estimates, tests = [], []
    for name in sorted(set(rows.extras) & set(other.extras)):
        own, theirs = rows.extras[name], other.extras[name]
        if own.dtype.kind in "OUS":
            mix = mix_tests(Counter(own.tolist()), Counter(theirs.tolist()))
            tests.append(TestResult(f"{name} (mix)", mix.statistic, mix.p_value))
            continue
        keep, keep_other = np.isfinite(own), np.isfinite(theirs)
        if not (keep.any() and keep_other.any()):
            continue
        one = Arm(own[keep].astype(np.float64), tuple(c[keep] for c in arm.clusters))
        two = Arm(theirs[keep_other].astype(np.float64), tuple(c[keep_other] for c in other_arm.clusters))
        margin = settings.metric_margin * float(two.value_N.std())
        estimate = mean_difference(one, two, margin=margin, alpha=settings.alpha, what=f"mean {name}")
        estimates.append(estimate)
        score = estimate.difference / estimate.standard_error if estimate.standard_error else 0.0
        tests.append(TestResult(f"mean {name} (t)", score, estimate.p_difference))
    return estimates, tests


def pilot(table: RolloutTable) -> tuple[float, float]:
    """Variance of one length, and design effect, from a pilot run: what `equivalence.rollouts_needed` wants to know."""
    arm, _ = arms(table.delivered(), None)
    return float(arm.value_N.var(ddof=1)), design_effect(arm)
