"""What happens to logits before the noise: penalties, forbidden tokens, temperature, top-k, top-p, min-p.

All in float64 and per row. Ties are decided by the lowest token id, whatever the sort does.

Shape legend: N = rows, V = vocabulary, C = candidate tokens of a row, E = entries (row, token) of a sparse change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Tokens that a row has seen, for the rows that penalise them. Each (row, token) pair occurs once.

    `count_E` counts the tokens that the policy sampled: presence and frequency penalise those. The repetition
    penalty is for every listed token: prompt, observed and sampled.
    """

    row_E: NDArray[np.int64]
    token_E: NDArray[np.int64]
    count_E: NDArray[np.int64]
    repetition_E: NDArray[np.float64]
    presence_E: NDArray[np.float64]
    frequency_E: NDArray[np.float64]


def penalise(logits_NV: Tensor, penalties: Penalties) -> None:
    """Apply penalties in place: the repetition factor first (CTRL), then presence and frequency (OpenAI)."""
    device = logits_NV.device
    row, token = torch.from_numpy(penalties.row_E).to(device), torch.from_numpy(penalties.token_E).to(device)
    repetition = torch.from_numpy(penalties.repetition_E).to(device)
    count = penalties.count_E
    taken = penalties.frequency_E * count + penalties.presence_E * (count > 0)
    value = logits_NV[row, token]
    value = torch.where(value > 0, value / repetition, value * repetition)
    logits_NV[row, token] = value - torch.from_numpy(taken).to(device)


def heat(logits_NV: Tensor, temperature_N: Tensor) -> Tensor:
    """Divide by the temperatures (all > 0). The maximum is taken off first, so that no temperature overflows."""
    return (logits_NV - logits_NV.amax(dim=1, keepdim=True)) / temperature_N[:, None]


def top_candidates(logits_NV: Tensor, k: int) -> Tensor:
    """The k best tokens of each row, ties to the lowest id, in ascending order of id. int64 [N, k].

    A threshold rather than the indices of `topk`, which picks among equals as it likes. Of a row of NaN, which is
    refused later, any k.
    """
    threshold_N1 = logits_NV.topk(k, dim=1).values[:, -1:]
    above = logits_NV > threshold_N1
    at = (logits_NV == threshold_N1) | threshold_N1.isnan()
    room_N1 = k - above.sum(dim=1, keepdim=True)
    kept = above | (at & (at.cumsum(dim=1) <= room_N1))
    return kept.nonzero()[:, 1].view(-1, k)


def survivors(logits_NC: Tensor, top_k_N: Tensor, top_p_N: Tensor, min_p_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which candidates pass top-k, then top-p among those, then min-p among those.

    Args:
        logits_NC: heated logits, candidates in ascending order of token id (which decides ties).
        top_k_N: int64, 0 keeps all. top_p_N, min_p_N: float64.

    Returns:
        order_NC: candidates from best to worst. sorted_NC: their logits. kept_N: how many of each row's best
        survive; every filter keeps a prefix of the order, and at least the best.
    """
    sorted_NC, order_NC = logits_NC.sort(dim=1, descending=True, stable=True)
    rank_C = torch.arange(sorted_NC.shape[1], device=sorted_NC.device)
    kept = sorted_NC > -torch.inf
    kept &= (rank_C < top_k_N[:, None]) | (top_k_N[:, None] == 0)
    probability = torch.where(kept, sorted_NC, -torch.inf).softmax(dim=1)
    before = probability.cumsum(dim=1) - probability
    kept &= (before < top_p_N[:, None]) | (top_p_N[:, None] >= 1.0)
    kept &= sorted_NC >= sorted_NC[:, :1] + min_p_N.log()[:, None]
    kept[:, 0] = True
    return order_NC, sorted_NC, kept.sum(dim=1)
