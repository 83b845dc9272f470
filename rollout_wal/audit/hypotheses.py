"""The assumptions under which the delivered sample is unbiased, each with the check that was made of it.

H1: the cohort is closed. H2: the time of loss depends on durable history only. H3: one noise draw per position,
or fresh independent noise. Before them: output commit, nothing delivered that could still be lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .extra import stats
from .simulate import LossExposure
from .table import RolloutTable

#: Below this p value the loss rates of ended and running rollouts are taken to differ. Strict, because the test
#: takes losses as independent, and those of one worker are not.
H2_LEVEL = 0.001


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """`held` is None where nothing in the data speaks to it."""

    name: str
    statement: str
    held: bool | None
    check: str

    @property
    def verdict(self) -> str:
        return {True: "held", False: "broken", None: "not checked"}[self.held]


def closed_cohort(table: RolloutTable, *, begun: int | None) -> Hypothesis:
    """H1 from the accounts: begun = delivered + censored, and nothing censored."""
    statement = "the cohort is closed: everything begun is delivered"
    delivered = int(table.delivered_N.sum())
    censored = len(table) - delivered
    if censored:
        parts = "; ".join(
            f"{reason}: {c.rollouts:,} rollouts, {c.length_mass:.1%} of the tokens"
            for reason, c in table.censored().items()
        )
        return Hypothesis("H1", statement, False, f"{delivered:,} delivered, {censored:,} censored ({parts})")
    if begun is None:
        return Hypothesis("H1", statement, None, "the data do not say how many rollouts were begun")
    if begun != delivered:
        check = f"{begun:,} begun, {delivered:,} delivered, {begun - delivered:,} unaccounted for"
        return Hypothesis("H1", statement, False, check)
    return Hypothesis("H1", statement, True, f"{begun:,} begun = {delivered:,} delivered + 0 censored")


def independent_loss(exposure: LossExposure | None) -> Hypothesis:
    """H2: at the same durable history, rollouts that have ended unseen are lost as often as those that go on.

    A Mantel–Haenszel test over (tokens kept, frontier). Strata in which only one kind was at risk say nothing.
    """
    statement = "the time of loss depends on durable history only"
    if exposure is None:
        return Hypothesis("H2", statement, None, "exposure to loss was not recorded")
    n1, d1 = exposure.ended_steps.astype(np.float64), exposure.ended_losses
    n0, d0 = exposure.running_steps.astype(np.float64), exposure.running_losses
    total, lost = n1 + n0, (d1 + d0).astype(np.float64)
    usable = (n1 > 0) & (n0 > 0) & (total > 1)
    expected = lost * n1 / np.where(total > 0, total, 1)
    variance = lost * (total - lost) * n1 * n0 / np.where(total > 1, total**2 * (total - 1), 1)
    spread = float(variance[usable].sum())
    if spread <= 0:
        reason = "nothing was ever finished and not yet durable" if n1.sum() == 0 else "no loss could tell"
        return Hypothesis("H2", statement, None, reason)
    z = float((d1 - expected)[usable].sum()) / math.sqrt(spread)
    p = 2 * float(stats.norm.sf(abs(z)))
    rates = f"{d1.sum() / n1.sum():.2%} per step of those that had ended, {d0.sum() / n0.sum():.2%} of those going on"
    return Hypothesis("H2", statement, p >= H2_LEVEL, f"lost: {rates}; equal at the same durable history: p = {p:.2g}")


def single_noise(noise_reused: int | None, *, identical: tuple[int, int] | None = None) -> Hypothesis:
    """H3 from a count of reused draws, or from token identity with an uninterrupted run.

    Args:
        noise_reused: tokens drawn with noise that another position had used.
        identical: with keyed noise, (rollouts equal token for token to the uninterrupted run, rollouts compared).
    """
    statement = "one noise draw per position, or fresh independent noise"
    if identical is not None:
        equal, compared = identical
        return Hypothesis("H3", statement, equal == compared, f"{equal} of {compared} equal token for token")
    if noise_reused is None:
        return Hypothesis("H3", statement, None, "the noise that was drawn is not recorded")
    check = "no draw was used twice" if noise_reused == 0 else f"{noise_reused:,} tokens were drawn with used noise"
    return Hypothesis("H3", statement, noise_reused == 0, check)


def output_commit(delivered_before_durable: int | None, *, keyed: bool = False) -> Hypothesis:
    """The order of durability and delivery. With keyed noise it harms no lengths: lost tokens come back the same."""
    statement = "output commit: nothing is delivered that could still be lost"
    if delivered_before_durable is None:
        return Hypothesis("I1", statement, None, "the moment of durability is not recorded")
    if delivered_before_durable == 0:
        return Hypothesis("I1", statement, True, "every delivered rollout was durable")
    check = f"{delivered_before_durable:,} rollouts were delivered while they could still be lost"
    if keyed:
        return Hypothesis("I1", statement, True, f"{check}, but with keyed noise they would have come back the same")
    return Hypothesis("I1", statement, False, check)
