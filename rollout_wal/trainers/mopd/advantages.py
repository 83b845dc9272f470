"""From the teachers' opinions of sampled tokens to what the policy gradient weighs them with.

Shape legend: B = sequences, T = tokens of the longest but one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: A specialist is so sure of itself that its opinion of a wrong token is -15 nats: such tokens would be all there is.
ADVANTAGE_MAX = 3.0


def weigh(opinion_BT: Tensor, mask_BT: Tensor, domains: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Advantages, and which tokens are learned from.

    A sequence counts up to the first token that its teacher rejects, and that one too. What follows a mistake that the
    teacher would not make is nothing that it has ever seen, and its opinion of it is noise.

    From each advantage the mean over tokens at the same place of an answer in the same domain is taken: all but no
    bias, and much less variance; what the end of sequence deserves says nothing of a first digit.

    Args:
        opinion_BT: log π_T − log π_train, floating [B, T].
        mask_BT: bool [B, T], sampled tokens that a teacher scored.
        domains: bool [B, T] each, the tokens of a domain.

    Returns:
        Advantages, [B, T], and bool [B, T], a part of `mask_BT`.
    """
    rejected_BT = (opinion_BT <= -ADVANTAGE_MAX) & mask_BT
    kept_BT = mask_BT & (rejected_BT.cumsum(1) - rejected_BT.long() == 0)
    advantage_BT = opinion_BT.clamp(-ADVANTAGE_MAX, ADVANTAGE_MAX)
    place_BT = kept_BT.cumsum(1)
    for domain_BT in domains:
        mine_BT = kept_BT & domain_BT
        for place in range(1, place_BT.shape[1] + 1):
            here_BT = mine_BT & (place_BT == place)
            if here_BT.any():
                advantage_BT = torch.where(here_BT, advantage_BT - advantage_BT[here_BT].mean(), advantage_BT)
    return advantage_BT, kept_BT
