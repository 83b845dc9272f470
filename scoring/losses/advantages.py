"""Advantages: how much better than expected a token, or a whole response, was. All are constants for the gradient.

Shape legend: B = sequences, T = tokens of the longest one, K = teachers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollout_kernels.checks import REFUSED, require_dtype, require_finite, require_shape
from rollout_kernels.errors import BadOption, BadTensor, problem

from .reduce import checked

_FLOATS = (torch.float32, torch.float64)


def group_advantages(rewards_B: Tensor, groups_B: Tensor, *, divide_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantage of each response over the others of its prompt.

        Â_i = (R_i − mean_g R) / (std_g R + eps)

    with the mean and the sample standard deviation (n − 1) over the responses of i's group. A group of one has no
    others to be better than, and a group whose rewards are all equal teaches nothing: both get exactly 0.

    Source: GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1; without the division: Dr. GRPO, arXiv:2503.20783.

    Args:
        rewards_B: float32 or float64 [B].
        groups_B: integer [B]; equal numbers are one group.
        divide_by_std: False leaves out the division.

    Returns:
        [B], detached.
    """
    require_dtype("rewards", rewards_B, _FLOATS)
    require_shape("rewards", rewards_B, (None,), "one reward for each response")
    require_shape("groups", groups_B, tuple(rewards_B.shape), f"rewards has shape {list(rewards_B.shape)}")
    require_finite("rewards", rewards_B)
    rewards = rewards_B.detach()
    _, group, sizes = torch.unique(groups_B, return_inverse=True, return_counts=True)
    sizes_B = sizes[group].to(rewards)
    total = torch.zeros(len(sizes), dtype=rewards.dtype, device=rewards.device)
    centred: Tensor = rewards - total.index_add(0, group, rewards)[group] / sizes_B
    low = torch.full_like(total, torch.inf).scatter_reduce(0, group, rewards, "amin")
    high = torch.full_like(total, -torch.inf).scatter_reduce(0, group, rewards, "amax")
    # Equal rewards minus their mean may leave rounding, which the division would blow up to the size of a signal.
    centred = torch.where((low == high)[group], torch.zeros_like(centred), centred)
    if not divide_by_std:
        return centred
    variance = total.index_add(0, group, centred.square())[group] / (sizes_B - 1).clamp(min=1)
    scaled: Tensor = centred / (variance.sqrt() + eps)
    return scaled


def opd_advantages(teacher_logprobs_BT: Tensor, student_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """On-policy distillation: the teacher's opinion of each sampled token.

        Â_t = sg[log π_T(y_t) − log π_train(y_t)]

    Minus its mean is the k1 estimate of the reverse KL; a group of one response is enough.

    Source: Lu et al. 2025, "On-Policy Distillation", Thinking Machines Lab; Qwen3, arXiv:2505.09388.

    Args:
        teacher_logprobs_BT, student_logprobs_BT: floating [B, T], of the sampled tokens at the same temperature.
        mask_BT: bool [B, T], sampled tokens that the teacher scored.

    Returns:
        [B, T], detached; 0 where masked.
    """
    teacher = checked("teacher_logprobs", teacher_logprobs_BT, mask_BT)
    return (teacher - checked("student_logprobs", student_logprobs_BT, mask_BT)).detach()


def multi_teacher_advantages(
    teacher_logprobs_KBT: Tensor, weights: Tensor, student_logprobs_BT: Tensor, mask: Tensor
) -> Tensor:
    """On-policy distillation from several teachers at once.

        Â_t = Σ_k w_k,t · sg[log π_k(y_t) − log π_train(y_t)]

    With weights that sum to 1 this is the policy gradient of the weighted sum of reverse KLs, whose minimum is the
    teachers' geometric mean. Source: multi-teacher OPD as in MiMo-V2-Flash, arXiv:2601.02780; hard routing by domain
    is one weight of 1.

    Args:
        teacher_logprobs_KBT: floating [K, B, T].
        weights: floating [K]; [K, B], one set for each sequence; or [K, B, T], one for each token; finite and not
            negative wherever the mask is True. 0 leaves a teacher out, and what stands in its log-probabilities is
            then not read.
        mask: bool [B, T], or [K, B, T] where teachers scored different tokens: what one did not score adds nothing.

    Returns:
        [B, T], detached; 0 where no teacher counts.
    """
    count, *tokens = teacher_logprobs_KBT.shape
    require_shape("teacher_logprobs", teacher_logprobs_KBT, (None, None, None), "teachers come first")
    each = mask if mask.dim() == 3 else mask.expand(count, *mask.shape)
    require_shape("mask", each, (count, *tokens), f"teacher_logprobs has shape {list(teacher_logprobs_KBT.shape)}")
    if list(weights.shape) not in ([count, *tokens][:n] for n in (1, 2, 3)):
        raise BadTensor(
            problem(
                f"weights has shape {list(weights.shape)} for {count} teachers of {tokens} tokens",
                consequence=REFUSED,
                remedy="Pass [K], [K, B] or [K, B, T]",
            )
        )
    if not count:
        raise BadTensor(problem("there are no teachers", consequence=REFUSED, remedy="Pass at least one"))
    weights_KBT = weights.detach().reshape(*weights.shape, *[1] * (3 - weights.dim())).expand(count, *tokens)
    if bool((each & ~((weights_KBT >= 0) & torch.isfinite(weights_KBT))).any()):
        raise BadTensor(
            problem(
                "weights holds a negative weight, an infinity or NaN where the mask is True",
                consequence=REFUSED,
                remedy="Pass finite weights of 0 or more; 0 leaves a teacher out",
            )
        )
    total = torch.zeros_like(checked("student_logprobs", student_logprobs_BT, each.any(0))).detach()
    for teacher_BT, weight_BT, mask_BT in zip(teacher_logprobs_KBT, weights_KBT, each):
        used = mask_BT & (weight_BT > 0)
        part = opd_advantages(teacher_BT, student_logprobs_BT, used)
        total = total + part * torch.where(used, weight_BT, torch.zeros_like(weight_BT))
    return total


def exopd_advantages(
    teacher_logprobs_BT: Tensor,
    student_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    extrapolation: float = 1.25,
) -> Tensor:
    """On-policy distillation with the implied reward extrapolated beyond the teacher.

        Â_t = sg[λ · (log π_T − log π_ref) − (log π_train − log π_ref)]

    λ = 1 is plain on-policy distillation, whatever the reference; λ > 1 extrapolates; λ in (0, 1) interpolates.

    Source: G-OPD / ExOPD, Yang et al. 2026, arXiv:2602.12125.

    Args:
        reference_logprobs_BT: floating [B, T], of the frozen reference model.
        extrapolation: λ.
    """
    _require_finite_option("extrapolation", extrapolation)
    teacher = checked("teacher_logprobs", teacher_logprobs_BT, mask_BT)
    student = checked("student_logprobs", student_logprobs_BT, mask_BT)
    reference = checked("reference_logprobs", reference_logprobs_BT, mask_BT)
    return (extrapolation * (teacher - reference) - (student - reference)).detach()


def mix_with_outcome(token_advantages_BT: Tensor, outcome_B: Tensor, mask_BT: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Teacher and outcome reward in one advantage.

        Â_t = Â_OPD,t + α · Â_ORM

    Source: MiMo-V2-Flash, arXiv:2601.02780, section on multi-teacher on-policy distillation.

    Args:
        token_advantages_BT: [B, T], for example of `opd_advantages`.
        outcome_B: [B], for example of `group_advantages`.
        alpha: weight of the outcome.
    """
    _require_finite_option("alpha", alpha)
    tokens = checked("token_advantages", token_advantages_BT, mask_BT)
    return (tokens + alpha * broadcast_advantages(outcome_B, mask_BT)).detach()


def broadcast_advantages(advantages: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T] from advantages of responses [B], or of tokens [B, T]; detached, 0 where masked."""
    if advantages.dim() == mask_BT.dim() - 1:
        require_shape("advantages", advantages, tuple(mask_BT.shape[:-1]), f"mask has shape {list(mask_BT.shape)}")
        advantages = advantages.unsqueeze(-1).expand(mask_BT.shape)
    return checked("advantages", advantages, mask_BT).detach()


def _require_finite_option(name: str, value: float) -> None:
    if not abs(value) < float("inf"):
        raise BadOption(
            problem(f"{name}={value!r} is not a finite number", consequence=REFUSED, remedy=f"Pass a finite {name}")
        )
