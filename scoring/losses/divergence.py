"""Divergences between whole distributions: GKD, local support, and the full vocabulary from hidden states.

Shape legend: B = sequences, T = tokens of the longest one, V = vocabulary (Vs the student's, Vt the teacher's),
K = tokens of the support, H = hidden sizes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rollout_kernels.checks import REFUSED, require_finite, require_positive, require_shape
from rollout_kernels.errors import BadOption, BadTensor, problem
from rollout_kernels.linear_divergence import Divergence, HiddenStates, TopK, linear_divergence_per_token
from rollout_kernels.linear_divergence.divergences import ABSENT
from rollout_kernels.linear_divergence.inputs import check_top_k
from rollout_kernels.mxfp4 import MXFP4

from .reduce import Reduction, reduce_tokens


def gkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask_BT: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Generalised knowledge distillation from logits.

        JSD_β(P‖Q) = β KL(P‖M) + (1 − β) KL(Q‖M),   M = β P + (1 − β) Q,   P teacher, Q student
        β = 0: KL(P‖Q), forward;   β = 1: KL(Q‖P), reverse

    both distributions softmax(logits / temperature) over the common prefix of the two vocabularies.

    Source: GKD, Agarwal et al. 2024, arXiv:2306.13649. As there, β = 0 and 1 stand for the limits of JSD_β / β and
    JSD_β / (1 − β); the formula itself is zero at both ends.

    Args:
        student_logits: floating [B, T, Vs].
        teacher_logits: floating [B, T, Vt], constants. On either side −inf excludes a token, and so does a
            log-probability of −10,000 or less. What both exclude adds nothing.
        beta: in [0, 1].

    Raises:
        BadTensor: a divergence that is infinite: at β = 1 the teacher excludes what the student does not, at β = 0 the
            other way round.
    """
    require_positive("temperature", temperature)
    _require_beta(beta)
    student, teacher = _log_softmax_pair(student_logits, teacher_logits, mask_BT, temperature)
    _refuse_infinite(student, teacher, beta, mask_BT)
    return reduce_tokens(_scatter(_jsd(student, teacher, beta), mask_BT), mask_BT, reduction, normalizer)


def union_support(student_logits: Tensor, teacher_top_ids: Tensor, k: int) -> Tensor:
    """int64 [B, T, K + k]: Top_K(T) ∪ Top_k(S) for each token, each id once; −1 fills up.

    Args:
        student_logits: floating [B, T, Vs].
        teacher_top_ids: integer [B, T, K]; −1 where there are fewer.
        k: how many of the student's most likely tokens.
    """
    with torch.no_grad():
        top = student_logits.topk(k, -1).indices
        ids, _ = torch.cat((teacher_top_ids.long(), top), -1).sort(-1, descending=True)
        twice = torch.zeros_like(ids, dtype=torch.bool)
        twice[..., 1:] = ids[..., 1:] == ids[..., :-1]
        return ids.masked_fill(twice, -1).sort(-1, descending=True).values


def local_support_loss(
    student_logits: Tensor,
    support_ids: Tensor,
    teacher_logprobs: Tensor,
    mask_BT: Tensor,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    outside: Literal["bucket", "renormalize"] = "bucket",
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The divergence on a few tokens, such as Top_k(T) ∪ Top_k(S), whose teacher log-probabilities are known.

        S = support,  q_i = π_student(i), p_i = π_T(i) for i in S
        "bucket":       one more outcome with the remaining mass on each side, 1 − Σ q_i and 1 − Σ p_i
        "renormalize":  q_i / Σ_S q and p_i / Σ_S p
        L = mean_t JSD_β(p‖q)   (β = 1, the default: reverse KL; β = 0: forward KL)

    With the bucket it is a lower bound of the full divergence, and mass that leaves the support is seen. Renormalised
    it is blind to that mass. Truncated sums without either may be negative, and are not offered.

    Source: top-k reverse KL with teacher support, Thinking Machines Lab 2025 and "Revisiting On-Policy Distillation",
    arXiv:2603.25562; the bucket is the coarse-graining of `rollout_kernels.linear_divergence`.

    Args:
        student_logits: floating [B, T, Vs].
        support_ids: integer [B, T, K], distinct within a token; −1 is no token.
        teacher_logprobs: floating [B, T, K], over the teacher's whole vocabulary at the same temperature; what stands
            beside −1 is not read.

    Raises:
        BadTensor: among others, at β = 0, a token of the support that the student excludes: see `gkd_loss`.
    """
    require_positive("temperature", temperature)
    _require_beta(beta)
    if outside not in ("bucket", "renormalize"):
        raise BadOption(
            problem(f"outside={outside!r} is unknown", consequence=REFUSED, remedy="Use 'bucket' or 'renormalize'")
        )
    require_shape("student_logits", student_logits, (*mask_BT.shape, None), f"mask has shape {list(mask_BT.shape)}")
    require_shape("support_ids", support_ids, (*mask_BT.shape, None), f"mask has shape {list(mask_BT.shape)}")
    require_shape("teacher_logprobs", teacher_logprobs, tuple(support_ids.shape), "one for each id of the support")
    ids_NK = support_ids[mask_BT].long()
    logprobs_NV = _log_softmax("student_logits", _wide(student_logits[mask_BT]), temperature)
    absent = ids_NK < 0
    vocabulary = logprobs_NV.shape[-1]
    if ids_NK.numel() and (int(ids_NK.max()) >= vocabulary or bool(absent.all(-1).any())):
        raise BadTensor(
            problem(
                f"support_ids holds ids up to {int(ids_NK.max())} for a vocabulary of {vocabulary}, or a token's "
                "support is empty",
                consequence=REFUSED,
                remedy="Mask tokens without a support; leave out ids that the student does not have",
            )
        )
    teacher_NK = teacher_logprobs.detach()[mask_BT].to(logprobs_NV.dtype).masked_fill(absent, ABSENT)
    check_top_k(TopK(ids_NK, teacher_NK))
    student_NK = logprobs_NV.gather(-1, ids_NK.clamp(min=0)).masked_fill(absent, ABSENT)
    _refuse_infinite(student_NK, teacher_NK, beta, mask_BT)
    if outside == "bucket":
        full = ((~absent).sum(-1) == vocabulary).unsqueeze(-1)
        # Summed over what is left, not 1 − Σ: where the tail is thin, the difference would be all rounding.
        inside = torch.zeros_like(logprobs_NV)
        inside = inside.scatter_add(-1, ids_NK.clamp(min=0), (~absent).to(inside)) > 0
        tail = logprobs_NV.masked_fill(inside, ABSENT).logsumexp(-1, keepdim=True)
        student_NK = torch.cat((student_NK, tail.masked_fill(full, ABSENT)), -1)
        rounding = torch.finfo(teacher_NK.dtype).eps
        rest = (1.0 - teacher_NK.exp().sum(-1, keepdim=True)).clamp(min=rounding).log()
        teacher_NK = torch.cat((teacher_NK, rest.masked_fill(full, ABSENT)), -1)
    student, teacher = torch.log_softmax(student_NK, -1), torch.log_softmax(teacher_NK, -1)
    return reduce_tokens(_scatter(_jsd(student, teacher, beta), mask_BT), mask_BT, reduction, normalizer)


def full_vocabulary_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | MXFP4,
    mask_BT: Tensor,
    *,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The exact divergence over the whole vocabulary, logits rebuilt from hidden states and never held at once.

        L = mean_t D(softmax(W_T h_T,t / τ), softmax(W_S h_S,t / τ)),   D = KL(S‖T) unless another is given

    Source: full-vocabulary on-policy distillation of DeepSeek-V4; the kernel is `rollout_kernels.linear_divergence`.

    Args:
        student_hidden: floating [B, T, Hs], after the final norm; student_head [Vs, Hs].
        teacher_hidden: floating [B, T, Ht], constants, as a scoring service returns them; teacher_head [Vt, Ht],
            dense or packed, from `GetTeacherHead`. It may be the student's own head: as the teacher's it is a constant.
        divergence: `ReverseKL()`, `ForwardKL()` or `JSD(beta)` of `rollout_kernels.linear_divergence`.
    """
    constant_head = teacher_head.detach() if isinstance(teacher_head, Tensor) else teacher_head
    teacher = HiddenStates(teacher_hidden.detach(), constant_head)
    values = linear_divergence_per_token(
        student_hidden, student_head, teacher, divergence, temperature=temperature, mask=mask_BT
    )
    return reduce_tokens(values, mask_BT, reduction, normalizer)


def _jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """[N] from log-probabilities. Absent outcomes are at or below ABSENT on both sides and contribute 0."""
    if beta == 0.0:
        return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)
    if beta == 1.0:
        return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    logs = torch.tensor([beta, 1.0 - beta], dtype=student_NV.dtype, device=student_NV.device).log()
    middle = torch.logaddexp(teacher_NV + logs[0], student_NV + logs[1])
    from_teacher = (teacher_NV.exp() * (teacher_NV - middle)).sum(-1)
    from_student = (student_NV.exp() * (student_NV - middle)).sum(-1)
    return beta * from_teacher + (1.0 - beta) * from_student


def _log_softmax_pair(student: Tensor, teacher: Tensor, mask_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, V] of the unmasked tokens over the common vocabulary."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        require_shape(name, logits, (*mask_BT.shape, None), f"mask has shape {list(mask_BT.shape)}")
    common = min(student.shape[-1], teacher.shape[-1])
    student_NV = _wide(student[mask_BT][:, :common])
    teacher_NV = teacher.detach()[mask_BT][:, :common].to(student_NV.dtype)
    student_NV = _log_softmax("student_logits", student_NV, temperature)
    return student_NV, _log_softmax("teacher_logits", teacher_NV, temperature)


def _log_softmax(name: str, logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities, those of excluded tokens ABSENT.

    Raises:
        BadTensor: NaN, +∞, or a token for which everything is excluded.
    """
    require_finite(name, logits_NV.clamp(min=ABSENT))
    logprobs_NV = torch.log_softmax(logits_NV / temperature, -1).clamp(min=ABSENT)
    require_finite(f"the log-softmax of {name}", logprobs_NV)
    return logprobs_NV


def _refuse_infinite(student_NV: Tensor, teacher_NV: Tensor, beta: float, mask_BT: Tensor) -> None:
    """Raises BadTensor where KL(S‖T) (β = 1) or KL(T‖S) (β = 0) is infinite; in between nothing is."""
    if 0.0 < beta < 1.0:
        return
    excluded_S, excluded_T = student_NV <= ABSENT, teacher_NV <= ABSENT
    bad_N = ((excluded_T & ~excluded_S) if beta == 1.0 else (excluded_S & ~excluded_T)).any(-1)
    if bool(bad_N.any()):
        index = mask_BT.nonzero()[int(bad_N.to(torch.uint8).argmax())].tolist()
        one, other = ("teacher", "student") if beta == 1.0 else ("student", "teacher")
        raise BadTensor(
            problem(
                f"the divergence of token {index} is infinite at beta={beta}: the {one} excludes what the {other} does "
                "not",
                consequence=REFUSED,
                remedy="Mask the token, exclude the same on both sides, or use a beta between 0 and 1",
            )
        )


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _scatter(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T] with 0 where masked."""
    out = torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device)
    return out.masked_scatter(mask_BT, values_N)


def _require_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise BadOption(
            problem(f"beta={beta!r} is out of range", consequence=REFUSED, remedy="Pass a beta between 0 and 1")
        )
