"""Policy-gradient objectives on the log-probabilities of sampled tokens.

Three policies may differ: `behav` sampled the tokens (the inference engine, perhaps some versions ago), `prox` is the
policy at the start of this round of updates, and `train` is the one that is being updated. A loss is minimised.

Shape legend: B = sequences, T = tokens of the longest one. Log-probabilities are floating [B, T], natural, of the
sampled tokens; `mask_BT` is bool, True on the sampled tokens that count. Advantages are [B] or [B, T] and constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollout_kernels.checks import REFUSED, require_positive
from rollout_kernels.errors import BadOption, problem

from .advantages import broadcast_advantages, opd_advantages
from .reduce import Reduction, checked, reduce_tokens, require_band

#: Far beyond any band or clip, and far from infinity, which times an advantage of 0 would be NaN.
_LOG_RATIO_MAX = 60.0


def policy_gradient_loss(
    logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """REINFORCE: L = −mean_t sg[Â_t] · log π_train(y_t).

    Source: Williams 1992. With `opd_advantages` its gradient is that of on-policy distillation.
    """
    logprobs = checked("logprobs", logprobs_BT, mask_BT)
    return reduce_tokens(-broadcast_advantages(advantages, mask_BT) * logprobs, mask_BT, reduction, normalizer)


def opd_loss(
    logprobs_BT: Tensor,
    teacher_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """On-policy distillation: L = −mean_t sg[log π_T(y_t) − log π_train(y_t)] · log π_train(y_t).

    Source: Lu et al. 2025, "On-Policy Distillation". The value means little; the gradient is an unbiased estimate of
    that of the reverse KL of each next token, given tokens that π_train itself sampled.
    """
    advantages = opd_advantages(teacher_logprobs_BT, logprobs_BT, mask_BT)
    return policy_gradient_loss(logprobs_BT, advantages, mask_BT, reduction=reduction, normalizer=normalizer)


def grpo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logprobs_BT: Tensor | None = None,
    kl_weight: float = 0.0,
    reduction: Reduction = "sequence_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The clipped surrogate, and a KL to a frozen reference if one is given.

        r_t = π_train(y_t) / π_old(y_t)
        L = mean_t [ −min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t) + β · k3_t ]
        k3_t = ρ_t − 1 − log ρ_t,   ρ_t = π_ref(y_t) / π_train(y_t)

    Source: GRPO, Shao et al. 2024, arXiv:2402.03300; unequal ε: DAPO, arXiv:2503.14476. "sequence_mean" is GRPO's
    length normalisation, "token_mean" DAPO's.
    """
    surrogate = _clipped(logprobs_BT, old_logprobs_BT, advantages, mask_BT, clip_low, clip_high)
    if (reference_logprobs_BT is None) != (kl_weight == 0.0):
        raise BadOption(
            problem(
                f"kl_weight={kl_weight}, reference log-probabilities given: {reference_logprobs_BT is not None}",
                consequence=REFUSED,
                remedy="Pass both reference_logprobs_BT and a kl_weight other than 0, or neither",
            )
        )
    if reference_logprobs_BT is not None:
        reference = checked("reference_logprobs", reference_logprobs_BT.detach(), mask_BT)
        log_rho = (reference - checked("logprobs", logprobs_BT, mask_BT)).clamp(-_LOG_RATIO_MAX, _LOG_RATIO_MAX)
        surrogate = surrogate + kl_weight * (torch.expm1(log_rho) - log_rho)
    return reduce_tokens(surrogate, mask_BT, reduction, normalizer)


def truncated_importance_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    behav_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    cap: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Truncated importance sampling between the trainer's old policy and the inference engine's.

        L = −mean_t sg[min(π_old(y_t) / π_behav(y_t), C)] · min(r_t Â_t, clip(r_t) Â_t),   r_t = π_train / π_old

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    require_positive("cap", cap)
    weight = _ratio("old_logprobs", old_logprobs_BT, "behav_logprobs", behav_logprobs_BT, mask_BT).detach()
    surrogate = _clipped(logprobs_BT, old_logprobs_BT, advantages, mask_BT, clip_low, clip_high)
    return reduce_tokens(weight.clamp(max=cap) * surrogate, mask_BT, reduction, normalizer)


def icepop_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    behav_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Tokens on which trainer and inference engine disagree are left out of the gradient, in both directions.

        k_t = sg[π_old(y_t) / π_behav(y_t)]
        L = −mean_t k_t · 1[α ≤ k_t ≤ β] · min(r_t Â_t, clip(r_t) Â_t),   r_t = π_train / π_old

    Tokens that are left out still count in the mean: their share must not raise the weight of the others.

    Source: IcePop, in "Every Step Evolves" (Ring-1T), arXiv:2510.18855, without its KL term. There the mean is over
    each response's tokens first: reduction="sequence_mean".
    """
    require_band("alpha", alpha, "beta", beta)
    k = _ratio("old_logprobs", old_logprobs_BT, "behav_logprobs", behav_logprobs_BT, mask_BT).detach()
    weight = torch.where((k >= alpha) & (k <= beta), k, torch.zeros_like(k))
    surrogate = _clipped(logprobs_BT, old_logprobs_BT, advantages, mask_BT, clip_low, clip_high)
    return reduce_tokens(weight * surrogate, mask_BT, reduction, normalizer)


def icepop_keep(
    train_logprobs_BT: Tensor, behav_logprobs_BT: Tensor, mask_BT: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """bool [B, T]: α ≤ π_train / π_behav ≤ β, for those who want IcePop's mask alone; False where masked."""
    require_band("alpha", alpha, "beta", beta)
    k = _ratio("train_logprobs", train_logprobs_BT, "behav_logprobs", behav_logprobs_BT, mask_BT).detach()
    return mask_BT & (k >= alpha) & (k <= beta)


def masked_importance_loss(
    logprobs_BT: Tensor,
    behav_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """REINFORCE with importance weights between trainer and inference engine, 0 outside a band; no proximal policy.

        w_t = sg[r_t] · 1[ε_low ≤ r_t ≤ ε_high],   r_t = π_train(y_t) / π_behav(y_t)
        L = −mean_t w_t · sg[Â_t] · log π_train(y_t)

    Source: multi-domain on-policy distillation of Nemotron-Cascade 2.
    """
    require_band("ratio_low", ratio_low, "ratio_high", ratio_high)
    r = _ratio("logprobs", logprobs_BT, "behav_logprobs", behav_logprobs_BT, mask_BT).detach()
    weight = torch.where((r >= ratio_low) & (r <= ratio_high), r, torch.zeros_like(r))
    logprobs = checked("logprobs", logprobs_BT, mask_BT)
    values = -weight * broadcast_advantages(advantages, mask_BT) * logprobs
    return reduce_tokens(values, mask_BT, reduction, normalizer)


def three_policy_loss(
    logprobs_BT: Tensor,
    prox_logprobs_BT: Tensor,
    behav_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    correction_cap: float | None = None,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Asynchronous training: trust region around a recent policy, correction for the one that sampled.

        c_t = sg[π_prox(y_t) / π_behav(y_t)],   r_t = π_train(y_t) / π_prox(y_t)
        L = −mean_t c_t · min(r_t Â_t, clip(r_t, 1 − ε_low, 1 + ε_high) Â_t)

    Source: decoupled PPO, "Batch size-invariance for policy optimization", Hilton et al. 2022, arXiv:2110.00641, as in
    asynchronous Nemotron 3 Ultra. The same shape as `truncated_importance_loss`, with a proximal policy of one's choice
    and a correction that is not capped by default.

    Args:
        correction_cap: truncate c_t here; None: never.
    """
    cap = float("inf") if correction_cap is None else correction_cap
    if correction_cap is not None:
        require_positive("correction_cap", correction_cap)
    c = _ratio("prox_logprobs", prox_logprobs_BT, "behav_logprobs", behav_logprobs_BT, mask_BT).detach().clamp(max=cap)
    surrogate = _clipped(logprobs_BT, prox_logprobs_BT, advantages, mask_BT, clip_low, clip_high)
    return reduce_tokens(c * surrogate, mask_BT, reduction, normalizer)


def _ratio(above_name: str, above_BT: Tensor, below_name: str, below_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """π_above / π_below, 1 where masked."""
    difference = checked(above_name, above_BT, mask_BT) - checked(below_name, below_BT, mask_BT)
    return difference.clamp(-_LOG_RATIO_MAX, _LOG_RATIO_MAX).exp()


def _clipped(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """−min(r Â, clip(r) Â) of each token, 0 where masked; the old log-probabilities are constants."""
    if not (0.0 <= clip_low <= 1.0 and 0.0 <= clip_high < float("inf")):
        raise BadOption(
            problem(
                f"clip_low={clip_low!r} and clip_high={clip_high!r} are out of range",
                consequence=REFUSED,
                remedy="Pass 0 ≤ clip_low ≤ 1 and a finite clip_high ≥ 0",
            )
        )
    advantages_BT = broadcast_advantages(advantages, mask_BT)
    r = _ratio("logprobs", logprobs_BT, "old_logprobs", old_logprobs_BT.detach(), mask_BT)
    return -torch.minimum(r * advantages_BT, r.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_BT)
