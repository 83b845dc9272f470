"""What recorded data say about the recovery policy when there is no uninterrupted run to compare with.

If what is interrupted is resumed, a rollout is interrupted in proportion to its length. If it starts again from
scratch, the delivered attempt was never interrupted, and how often earlier attempts were says nothing about its
length. So the slope of interruptions over length, in units of the slope expected of resuming, is 1 or 0.
Prompts differ both in length and in how often they are hit, so the slope is taken within prompts where they repeat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .clusters import arms, cluster_variance
from .extra import optimize, stats
from .html import number
from .lengths import Floats, LengthDistribution
from .table import Ints, RolloutTable

Kind = Literal["restarts", "resumes", "undetermined"]
#: Rollouts per prompt below which a prompt's own law cannot be estimated: the tilt of so small a sample is too weak.
COPIES_MIN = 8
#: No hazard is taken to be larger, per token.
_HAZARD_MAX = 50.0


@dataclass(frozen=True, slots=True)
class Signature:
    """The slope of interruptions over length: 0 restarts, 1 resumes, with its 95 % interval.

    Args:
        hazard: the constant hazard per token that explains the interruptions, under the kind that was found (under
            restarting if undetermined); as a rate, of which a token is survived with exp(-hazard).
        mean_if_restarted: what the mean length would have been without the bias, if these data come from restarting.
        within_prompts: whether prompts repeat, so that their differences could be removed.
    """

    kind: Kind
    slope: float
    ci_low: float
    ci_high: float
    hazard: float
    mean_if_restarted: float
    within_prompts: bool

    @property
    def explanation(self) -> str:
        told = {
            "restarts": "Interruptions say nothing about the length: what is interrupted starts again from scratch.",
            "resumes": "Longer rollouts were interrupted more often: what is interrupted goes on.",
            "undetermined": "The data do not tell whether what is interrupted starts again or goes on.",
        }[self.kind]
        caveat = "" if self.within_prompts else " Prompts do not repeat, so differences between them may mimic either."
        slope, low, high = (number(x, ".2f") for x in (self.slope, self.ci_low, self.ci_high))
        return f"{told} Slope {slope} ({low} to {high}).{caveat}"


def signature(table: RolloutTable) -> Signature | None:
    """None where nothing was interrupted, or where all rollouts are of the same length."""
    rows = table.delivered()
    length, hits = rows.length_N.astype(np.float64), rows.interruptions_N.astype(np.float64)
    mean_hits = float(hits.mean())
    within = len(np.unique(rows.prompt_N)) < 0.75 * len(rows)
    own_length = _centred(length, rows.prompt_N) if within else length - length.mean()
    if mean_hits == 0 or not own_length.any():
        return None
    only_flag = _only_flags(rows)
    resume_hazard = _resume_hazard(length, mean_hits, only_flag=only_flag)
    expected = 1 - np.exp(-resume_hazard * length) if only_flag else resume_hazard * length
    own_hits = _centred(hits, rows.prompt_N) if within else hits - mean_hits
    scale = float(own_length @ expected)
    slope = float(own_length @ own_hits) / scale
    arm, _ = arms(rows, None)
    own_expected = _centred(expected, rows.prompt_N) if within else expected - expected.mean()
    residual = own_hits - slope * own_expected
    variance, freedom = cluster_variance(own_length * residual / scale, arm.clusters)
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    low, high = slope - reach, slope + reach
    # Re-sampled tokens and uneven hazards move the slope a little off 0 or 1, so the half way decides.
    kind: Kind = "restarts" if high < 0.5 else "resumes" if low > 0.5 else "undetermined"
    if_restarted = restart_hazard(rows)
    hazard = resume_hazard if kind == "resumes" else if_restarted
    return Signature(kind, slope, low, high, hazard, untilted(rows, if_restarted).mean, within)


def untilted(rows: RolloutTable, hazard: float) -> LengthDistribution:
    """The true law behind delivered rows that were restarted at this hazard: each prompt's own law, tilted back."""
    _, index = np.unique(rows.prompt_N, return_inverse=True)
    exponent = hazard * (rows.length_N - rows.length_N.max())
    weight = np.exp(exponent)
    counts = np.bincount(index)
    weight *= counts[index] / np.bincount(index, weights=weight)[index]
    return LengthDistribution.normalised(np.bincount(rows.length_N, weights=weight))


def restart_hazard(rows: RolloutTable) -> float:
    """The hazard per token, as a rate, at which restarting gives this many interruptions, from the delivered lengths
    alone.

    An attempt of length l survives with exp(-hazard * (l - 1)), and the mean of its inverse over the delivered of a
    prompt is that prompt's number of attempts per delivery. A flag says only whether there was more than one attempt,
    and a prompt's first attempt is delivered with the inverse of that number.
    """
    mean_hits = float(rows.interruptions_N.mean())
    steps = (rows.length_N - 1).astype(np.float64)
    if mean_hits <= 0 or not steps.any():
        return 0.0
    if not _only_flags(rows):
        attempts = 1 + mean_hits
        high = math.log(attempts) / float(steps.mean())  # by Jensen's inequality the answer is at most this
        return float(optimize.brentq(lambda h: float(np.exp(h * steps).mean()) - attempts, 0, high * (1 + 1e-9)))
    prompts, index = np.unique(rows.prompt_N, return_inverse=True)
    if len(prompts) * COPIES_MIN > len(rows):
        index = np.zeros(len(rows), dtype=np.int64)  # too few rollouts of each: all as of one law
    copies = np.bincount(index)

    def hit(hazard: float) -> float:
        with np.errstate(over="ignore"):
            attempts = np.bincount(index, weights=np.exp(hazard * steps)) / copies
        return 1 - float(copies @ (1 / attempts)) / len(rows)

    told = min(mean_hits, hit(_HAZARD_MAX) - 1e-6)
    return float(optimize.brentq(lambda h: hit(h) - told, 0, _HAZARD_MAX)) if told > 0 else _HAZARD_MAX


def _only_flags(rows: RolloutTable) -> bool:
    return bool(rows.interruptions_N.max() <= 1)


def _centred(value_N: Floats, code_N: Ints) -> Floats:
    _, index = np.unique(code_N, return_inverse=True)
    means = np.bincount(index, weights=value_N) / np.bincount(index)
    return np.asarray(value_N - means[index])


def _resume_hazard(length_N: Floats, mean_hits: float, *, only_flag: bool) -> float:
    """The hazard per token at which resuming gives this many interruptions per rollout."""
    if not only_flag:
        return mean_hits / float(length_N.mean())
    target = min(mean_hits, 1 - 1e-6)
    return float(optimize.brentq(lambda h: float((1 - np.exp(-h * length_N)).mean()) - target, 0, _HAZARD_MAX))
