"""Predictions for a live or recorded run, whose true law and hazard are not known but estimated."""

from __future__ import annotations

import math

import numpy as np

from .lengths import LengthDistribution
from .policies import Restart
from .schedules import constant
from .signature import COPIES_MIN, restart_hazard
from .table import RolloutTable
from .theory import Prediction, predict_mixture


def hazard_per_token(table: RolloutTable) -> float:
    """The probability that a token after which a rollout goes on is followed by an interruption.

    From the interruptions per token sampled, those lost included and the last of each delivered rollout left out. Where
    what was lost is not known: as if every interrupted rollout had restarted.
    """
    if table.recomputed_N is None:
        return -math.expm1(-restart_hazard(table.delivered()))
    sampled = int(table.length_N.sum()) + int(table.recomputed_N.sum())
    return float(table.interruptions_N.sum()) / max(sampled - int(table.delivered_N.sum()), 1)


def restart_prediction(reference: RolloutTable, hazard: float) -> Prediction | None:
    """What restarting from scratch at this hazard per token (a probability) would deliver of these prompts.

    The law of each prompt is estimated from the reference, and each prompt is retried until it is delivered. None where
    prompts do not repeat often enough for that.
    """
    rows = reference.delivered()
    codes, index = np.unique(rows.prompt_N, return_inverse=True)
    counts = np.bincount(index)
    if counts.min() < COPIES_MIN and len(codes) > 1:
        return None
    laws = [LengthDistribution.from_lengths(rows.length_N[index == i]) for i in range(len(codes))]
    return predict_mixture(laws, constant(min(hazard, 1.0)), Restart(), weights=counts)
