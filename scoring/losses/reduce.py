"""What all objectives share: which tokens count, and how their losses become one number.

Only tokens that the policy sampled may count: never prompt, padding, tool output, or what follows the end of the
sequence. The mask says which these are; under it any number may stand, NaN included, and none of it is read.

Shape legend: B = sequences, T = tokens of the longest one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rollout_kernels.checks import REFUSED, require_device, require_dtype, require_finite, require_shape
from rollout_kernels.errors import BadOption, problem

#: "token_mean": over all tokens of the batch. "sequence_mean": over each sequence's tokens, then over the sequences
#: that have any. "sum": neither.
Reduction = Literal["token_mean", "sequence_mean", "sum"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked(name: str, values: Tensor, mask_BT: Tensor, *, finite: bool = True) -> Tensor:
    """Values with 0 where the mask is False, so that what stands there reaches neither the loss nor a gradient.

    Half-precision values become float32: a ratio of two bfloat16 log-probabilities is wrong by a percent.

    Raises:
        BadTensor: another shape than the mask, another device, or a value that is not finite under a True mask.
    """
    require_dtype("mask", mask_BT, (torch.bool,))
    require_dtype(name, values, _FLOATS)
    require_shape(name, values, tuple(mask_BT.shape), f"mask has shape {list(mask_BT.shape)}")
    require_device(name, values, mask_BT.device, "mask")
    values = torch.where(mask_BT, values, torch.zeros((), dtype=values.dtype, device=values.device))
    if finite:
        require_finite(name, values)
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def reduce_tokens(
    values_BT: Tensor,
    mask_BT: Tensor,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """One number from per-token losses.

    Args:
        values_BT: floating [B, T] ([T] counts as one sequence).
        mask_BT: bool, of the same shape.
        reduction: how; see `Reduction`.
        normalizer: divide the sum over all tokens by this instead, whatever the reduction: B · T_max for a mean whose
            weight does not depend on how long a sequence is (Dr. GRPO, arXiv:2503.20783), or the tokens of all ranks.
            Where gradients are averaged over ranks, as DDP and FSDP do, that is the tokens of all ranks divided by the
            number of ranks.

    Returns:
        scalar; 0, with zero gradients, if nothing counts, whatever the normalizer.

    Raises:
        BadTensor: values and a mask that do not fit. BadOption: an unknown reduction, or a normalizer that is negative,
        not finite, or 0 although tokens count. One on a GPU is not looked at, which would wait for the GPU.
    """
    values_BT = checked("values", values_BT, mask_BT, finite=False)
    if reduction not in ("token_mean", "sequence_mean", "sum"):
        raise BadOption(
            problem(
                f"reduction={reduction!r} is unknown",
                consequence=REFUSED,
                remedy="Use 'token_mean', 'sequence_mean' or 'sum'",
            )
        )
    if normalizer is not None:
        return values_BT.sum() / _divisor(normalizer, mask_BT)
    if reduction == "sum":
        return values_BT.sum()
    counts_B = mask_BT.sum(-1)
    if reduction == "token_mean":
        return values_BT.sum() / counts_B.sum().clamp(min=1)
    means_B = values_BT.sum(-1) / counts_B.clamp(min=1)
    return means_B.sum() / (counts_B > 0).sum().clamp(min=1)


def _divisor(normalizer: float | Tensor, mask_BT: Tensor) -> float | Tensor:
    """The normalizer, or 1 if nothing counts: 0 / 0 would be NaN."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().reshape(())
        if normalizer.device.type != "cpu":
            return torch.where(mask_BT.any(), normalizer, 1)
        normalizer = normalizer.item()
    if 0.0 < normalizer < float("inf"):
        return normalizer
    if normalizer == 0.0 and not bool(mask_BT.any()):
        return 1.0
    raise BadOption(
        problem(
            f"normalizer={normalizer!r} is out of range",
            consequence=REFUSED,
            remedy="Pass a finite number > 0; 0 only where the mask is False everywhere",
        )
    )


def require_band(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raises BadOption unless 0 ≤ low ≤ high < ∞."""
    if not 0.0 <= low <= high < float("inf"):
        raise BadOption(
            problem(
                f"{low_name}={low!r} and {high_name}={high!r} are no band of ratios",
                consequence=REFUSED,
                remedy=f"Pass 0 ≤ {low_name} ≤ {high_name}, both finite",
            )
        )
