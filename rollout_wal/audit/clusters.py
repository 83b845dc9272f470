"""Rollouts are not independent pieces of evidence: those of one prompt are alike, those of one failure were lost
together.

Every variance of the audit is computed from sums over clusters. Codes are shared between the two arms of a
comparison, so that the same prompt in both arms cancels as it would in a paired test.

Shape legend: N = rows, G = clusters, V = distinct lengths 0..V-1, B = bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lengths import Floats, LengthDistribution
from .table import Ints, RolloutTable

#: Clusters beyond this many are merged at random for the bootstrap. Merging keeps it valid, and a thousand are enough.
BOOTSTRAP_CLUSTERS_MAX = 1000
#: Fewer prompts than this are not used as clusters.
PROMPTS_MIN = 10


@dataclass(frozen=True, eq=False, slots=True)
class Arm:
    """The lengths of one arm with their cluster codes, one array per way of clustering."""

    value_N: Floats
    clusters: tuple[Ints, ...]

    @property
    def mean(self) -> float:
        return float(self.value_N.mean())


def arms(treated: RolloutTable, reference: RolloutTable | None) -> tuple[Arm, Arm | None]:
    """The lengths of both tables, clustered by prompt and by failure (by worker, where failures are not recorded).

    With fewer prompts than PROMPTS_MIN the rows count as independent instead: so few clusters carry no usable
    variance. Where both arms (or the known law) have the same prompts in the same proportions, ignoring what prompts
    have in common only widens the intervals; where not, `compare` gives no verdict.
    """
    tables = [treated] if reference is None else [treated, reference]
    prompts = len(np.unique(np.concatenate([t.prompt_N for t in tables])))
    out: list[Arm] = []
    for number, table in enumerate(tables):
        # Codes of prompts are shared between the arms; those of failures and of lone rows must not be.
        lone = np.arange(len(table), dtype=np.int64) + ((2 * number) << 40)
        shared = table.failure_N if table.failure_N is not None else table.worker_N
        hit = lone if shared is None else np.where(shared >= 0, shared + ((2 * number + 1) << 40), lone)
        by_prompt = table.prompt_N if prompts >= PROMPTS_MIN else lone
        out.append(Arm(table.length_N.astype(np.float64), (by_prompt, hit)))
    return out[0], out[1] if len(out) == 2 else None


def _groups(code_N: Ints) -> tuple[Ints, int]:
    unique, index = np.unique(code_N, return_inverse=True)
    return index.astype(np.int64), len(unique)


def _one_way(influence_N: Floats, code_N: Ints) -> tuple[float, int]:
    index, groups = _groups(code_N)
    sums = np.bincount(index, weights=influence_N, minlength=groups)
    return float(sums @ sums) * groups / max(groups - 1, 1), groups


def cluster_variance(influence_N: Floats, clusters: Sequence[Ints]) -> tuple[float, float]:
    """The variance of a sum of influences that are independent only between clusters, and the degrees of freedom.

    Two ways are combined as one plus the other less their intersection (Cameron, Gelbach and Miller 2011), and never
    as less than the first way alone: what the second adds is estimated with noise, and may come out below zero. The
    second way is no such floor. Where the arms share their prompts, the first way has what they share cancelled and
    the second has not. The degrees of freedom are Satterthwaite's: few for a sum of parts that are known badly.
    """
    first, groups = _one_way(influence_N, clusters[0])
    freedom = float(max(groups - 1, 1))
    if len(clusters) == 1 or first == 0:
        return first, freedom
    one, _ = _groups(clusters[0])
    two, groups = _groups(clusters[1])
    _, cell_N, cell = np.unique(one * groups + two, return_index=True, return_inverse=True)
    in_cell = np.bincount(cell, weights=influence_N)
    sums = np.bincount(two, weights=influence_N)
    # What a cluster of the second way adds: the products of its rows that are of different clusters of the first.
    added = sums**2 - np.bincount(two[cell_N], weights=in_cell**2, minlength=groups)
    added = added[np.bincount(two[cell_N], minlength=groups) > 1]
    if not len(added):
        return first, freedom
    scale = len(added) / max(len(added) - 1, 1)
    variance = first + max(float(added.sum()) * scale, 0.0)
    doubt = first**2 / freedom + len(added) * float(added.var()) * scale**2 / 2
    return variance, min(max(variance**2 / doubt, 1.0), max(min(freedom, groups - 1), 1.0))


def mean_influence(treated: Arm, reference: Arm | None) -> tuple[Floats, tuple[Ints, ...]]:
    """Each row's share in the error of the difference of means, with its clusters."""
    own = (treated.value_N - treated.value_N.mean()) / len(treated.value_N)
    if reference is None:
        return own, treated.clusters
    other = -(reference.value_N - reference.value_N.mean()) / len(reference.value_N)
    ways_both = zip(treated.clusters, reference.clusters)
    return np.concatenate([own, other]), tuple(np.concatenate(pair) for pair in ways_both)


def within_clusters(arm: Arm) -> Arm:
    """An arm of `arms` with the same mean and only the variance within its prompts: for what is fixed per prompt.

    Deviations are widened by n / (n - 1) under the root, as each cluster's mean is estimated from its own n
    rows. Rows that are alone in their cluster stay as they are, which only widens the error.
    """
    _, index = np.unique(arm.clusters[0], return_inverse=True)
    count_N = np.bincount(index)[index]
    own_mean_N = (np.bincount(index, weights=arm.value_N) / np.bincount(index))[index]
    several = count_N > 1
    widened = np.sqrt(np.divide(count_N, count_N - 1, out=np.ones(len(count_N)), where=several))
    value = np.where(several, arm.mean + (arm.value_N - own_mean_N) * widened, arm.value_N)
    return Arm(value + (arm.mean - float(value.mean())), arm.clusters[1:])


def design_effect(treated: Arm, reference: Arm | None = None) -> float:
    """By how much clustering inflates the variance of the (difference of) means over that of independent rows."""
    influence, clusters = mean_influence(treated, reference)
    plain = float(influence @ influence)
    return cluster_variance(influence, clusters)[0] / plain if plain > 0 else 1.0


@dataclass(frozen=True, eq=False, slots=True)
class ClusterHistograms:
    """How often each length occurs in each cluster, per arm; float64 [G, V]. `reference` is None for a known law.

    `widening` is what errors along these clusters are to be multiplied with. They leave out what the other way of
    clustering adds, and G clusters about their own mean vary less by (G - 1) / G. `freedom`: degrees of freedom of
    these errors.
    """

    treated_GV: Floats
    reference_GV: Floats | None
    known_V: Floats | None
    widening: float
    freedom: float

    @classmethod
    def build(cls, treated: Arm, reference: Arm | LengthDistribution, *, rng: np.random.Generator) -> ClusterHistograms:
        """Clusters along the way that alone gives the mean the error nearest to that of all ways together."""
        arms = [treated] if isinstance(reference, LengthDistribution) else [treated, reference]
        influence, clusters = mean_influence(treated, arms[1] if len(arms) == 2 else None)
        variance, freedom = cluster_variance(influence, clusters)
        alone = [_one_way(influence, way) for way in clusters]
        best = min(range(len(alone)), key=lambda i: abs(math.log((alone[i][0] or 1.0) / (variance or 1.0))))
        own, groups = alone[best]
        widening = math.sqrt(max(variance / own if own else 1.0, 1.0) * groups / max(groups - 1, 1))
        index, groups = _groups(clusters[best])
        if groups > BOOTSTRAP_CLUSTERS_MAX:
            index = rng.permutation(groups)[index] % BOOTSTRAP_CLUSTERS_MAX
            groups = BOOTSTRAP_CLUSTERS_MAX
        longest = max(int(arm.value_N.max()) for arm in arms)
        if isinstance(reference, LengthDistribution):
            longest = max(longest, reference.longest)
        width = longest + 1
        histograms, first = [], 0
        for arm in arms:
            rows = len(arm.value_N)
            cell = index[first : first + rows] * width + arm.value_N.astype(np.int64)
            histograms.append(np.bincount(cell, minlength=groups * width).reshape(groups, width).astype(np.float64))
            first += rows
        if isinstance(reference, LengthDistribution):
            return cls(histograms[0], None, reference.padded(longest), widening, freedom)
        return cls(histograms[0], histograms[1], None, widening, freedom)

    def pmfs(self) -> tuple[Floats, Floats]:
        """The observed laws of the two arms."""
        treated = self.treated_GV.sum(axis=0)
        if self.reference_GV is None:
            assert self.known_V is not None
            return treated / treated.sum(), self.known_V
        reference = self.reference_GV.sum(axis=0)
        return treated / treated.sum(), reference / reference.sum()

    def resampled(self, replicates: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Cumulative laws of both arms with the clusters drawn with replacement; [B, V] each."""
        groups = len(self.treated_GV)
        weight_BG = rng.multinomial(groups, np.full(groups, 1 / groups), size=replicates).astype(np.float64)

        def cumulative(histogram_GV: Floats) -> Floats:
            count_BV = np.cumsum(weight_BG @ histogram_GV, axis=1)
            total_B1 = count_BV[:, -1:]
            return count_BV / np.where(total_B1 > 0, total_B1, 1.0)

        treated = cumulative(self.treated_GV)
        if self.reference_GV is None:
            assert self.known_V is not None
            return treated, np.broadcast_to(np.cumsum(self.known_V), treated.shape)
        return treated, cumulative(self.reference_GV)

    def cumulative_influence(self) -> Floats:
        """Each cluster's share in the error of the difference of cumulative laws, widened; [G, V]."""
        treated, reference = self.pmfs()

        def share(histogram_GV: Floats, pmf_V: Floats) -> Floats:
            centred = histogram_GV - histogram_GV.sum(axis=1, keepdims=True) * pmf_V
            return np.asarray(np.cumsum(centred, axis=1) * (self.widening / histogram_GV.sum()))

        out = share(self.treated_GV, treated)
        return out if self.reference_GV is None else out - share(self.reference_GV, reference)


def quantiles(cumulative_BV: NDArray[np.float64], q: float) -> Floats:
    """The q-quantile of each cumulative law; length l is spread evenly over (l - 1, l], so that it moves
    smoothly. [B]"""
    index_B = np.minimum((cumulative_BV < q).sum(axis=1), cumulative_BV.shape[1] - 1)
    rows = np.arange(len(index_B))
    above_B = cumulative_BV[rows, index_B]
    below_B = np.where(index_B > 0, cumulative_BV[rows, np.maximum(index_B - 1, 0)], 0.0)
    step_B = above_B - below_B
    part_B = np.divide(q - below_B, step_B, out=np.ones_like(step_B), where=step_B > 0)
    return np.asarray(index_B - 1 + np.clip(part_B, 0.0, 1.0))
