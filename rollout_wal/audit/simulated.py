"""Simulated cells: theory and simulation of one policy under one process, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import AuditError
from .compare import Comparison, Settings, compare, pilot
from .equivalence import rollouts_needed
from .hypotheses import closed_cohort, independent_loss, output_commit, single_noise
from .lengths import LengthDistribution
from .policies import Policy
from .schedules import Interruptions
from .simulate import simulate
from .theory import predict_mixture

#: Rollouts of the pilot from which the number needed is computed.
PILOT_ROLLOUTS = 10_000


def simulated_comparison(
    true: Sequence[LengthDistribution],
    process: Interruptions,
    policy: Policy,
    *,
    rollouts: int,
    settings: Settings | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Simulate, predict where the law is known, and compare with the exact true law."""
    settings = settings or Settings()
    run = simulate(true, process, policy, rollouts=rollouts, seed=seed)
    try:
        prediction = predict_mixture(true, process, policy)
    except AuditError:
        prediction = None  # no exact law for this combination: measured only
    keyed = getattr(policy, "noise", "fresh") == "keyed"
    return compare(
        name or policy.name,
        run.table,
        LengthDistribution.mixture(true),
        settings=settings,
        prediction=prediction,
        hypotheses=(
            output_commit(run.delivered_before_durable, keyed=keyed),
            closed_cohort(run.table, begun=len(run.table)),
            independent_loss(run.exposure),
            single_noise(run.noise_reused),
        ),
    )


def rollouts_for_power(
    true: Sequence[LengthDistribution],
    process: Interruptions,
    policy: Policy,
    *,
    settings: Settings,
    seed: int = 0,
) -> int:
    """How many rollouts must be begun to show equivalence of the mean with the power of the settings, from a pilot of
    this cell.

    The pilot says how much lengths vary, how much clustering inflates that, and how many of those begun are delivered.
    """
    run = simulate(true, process, policy, rollouts=PILOT_ROLLOUTS, seed=seed)
    variance, inflation = pilot(run.table)
    margin = settings.margin * LengthDistribution.mixture(true).mean
    delivered = rollouts_needed(
        variance, margin=margin, power=settings.power, alpha=settings.alpha, design_effect=max(inflation, 1.0)
    )
    return math.ceil(delivered / float(run.table.delivered_N.mean()))
