"""What callers use: a training loss, or a divergence for each token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import REFUSED, describe, require_positive
from ..errors import BadOption, BadTensor, problem
from ..mxfp4 import MXFP4
from .chunks import ChunkLoop, Result, Settings, Wanted
from .divergences import Divergence, ReverseKL, SampledKL
from .inputs import Inputs, prepare
from .teachers import HiddenStates, Logits, Teacher

# One [C, V] buffer. Larger chunks multiply faster, smaller ones stay in caches and keep the peak low.
_BUFFER_BYTES_CPU = 16 << 20
_BUFFER_BYTES_GPU = 128 << 20


class LinearDivergence(NamedTuple):
    """A loss to call `backward` on, and what it is made of."""

    loss: Tensor
    """scalar"""
    per_token: Tensor
    """[...], the divergence of each token, without weights or the temperature's factor; detached, 0 where masked"""


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    divergence: Divergence | SampledKL | None = None,
    *,
    temperature: float = 1.0,
    scale_by_squared_temperature: bool = False,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    normalizer: float | Tensor | None = None,
    top_k: int | None = None,
    chunk_tokens: int | None = None,
    accumulate_in: torch.dtype | None = None,
) -> LinearDivergence:
    """The divergence between a student and a teacher, from the student's hidden states, without ever holding all
    logits.

    Gradients reach whatever requires them: the student's hidden states and head, and the teacher's hidden states,
    dense head or logits. A head that does not require a gradient costs none. They are computed here, not in
    `backward`; so is their memory allocated here. Where the vocabularies differ, both distributions are those over
    the common prefix of token ids.

    Args:
        student_hidden: floating [..., H], after the final norm; any number of leading dimensions.
        student_weight: the student's LM head, floating [V, H].
        teacher: `HiddenStates`, `Logits`, `TopK` or `Sampled`.
        divergence: `ReverseKL` (the default), `ForwardKL` or `JSD`; with a `Sampled` teacher a `SampledKL`.
        temperature: both sides' logits are divided by it.
        scale_by_squared_temperature: multiply the loss by temperature², which keeps the size of gradients
            comparable between temperatures (Hinton et al. 2015, arXiv:1503.02531).
        mask: bool [...]; False leaves a token out: its divergence is not computed and its values are never read.
        token_weights: floating [...], constants that the divergences are multiplied by.
        reduction: "sum", or "mean": the sum divided by the number of unmasked tokens (by 1 if there are none).
        normalizer: divide the sum by this instead, for example by the tokens of all ranks; where gradients are averaged
            over ranks, as DDP and FSDP do, by those divided by the number of ranks. 0 only if all tokens are masked.
        top_k: with `HiddenStates` or `Logits`, compare only the teacher's k most likely tokens and the rest as one.
        chunk_tokens: tokens per chunk. The result does not depend on it, beyond rounding. None chooses.
        accumulate_in: dtype in which weight gradients are summed. None: that of the computation, float32 or float64. A
            half-precision dtype halves their memory, and rounds once for each chunk.

    Returns:
        The loss, and each token's divergence. All tokens masked: a loss of 0 with zero gradients.

    Raises:
        BadTensor: shapes, dtypes or devices that do not fit, or an infinite or undefined divergence; it names the
        token. BadOption: an option out of range, or one that does not go with this teacher.
    """
    divergence = ReverseKL() if divergence is None else divergence
    inputs = prepare(student_hidden, student_weight, teacher, divergence, top_k, mask, token_weights)
    settings = _settings(inputs, divergence, temperature, top_k, chunk_tokens, accumulate_in)
    if reduction not in ("mean", "sum"):
        raise BadOption(
            problem(f"reduction={reduction!r} is unknown", consequence=REFUSED, remedy="Use 'mean' or 'sum'")
        )
    if normalizer is None:
        normalizer = max(inputs.hidden_TH.shape[0], 1) if reduction == "mean" else 1.0
    if not inputs.hidden_TH.shape[0] and float(normalizer) == 0.0:
        normalizer = 1.0
    require_positive("normalizer", float(normalizer))
    factor = temperature**2 if scale_by_squared_temperature else 1.0
    coefficient_T = inputs.weights_T * (factor / normalizer)
    call = _Call(inputs, settings, coefficient_T, torch.is_grad_enabled())
    loss, values_T = _Fused.apply(*inputs.tensors(), call)  # type: ignore[no-untyped-call]
    return LinearDivergence(loss, inputs.scatter(values_T))


def linear_divergence_per_token(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    divergence: Divergence | SampledKL | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    top_k: int | None = None,
    chunk_tokens: int | None = None,
    accumulate_in: torch.dtype | None = None,
) -> Tensor:
    """The divergence of each token, differentiable, for losses that `linear_divergence` cannot express.

    What each token's gradient is multiplied by is known only in `backward`, so where a head requires a gradient,
    logits are computed a second time there: about half as much work again. Arguments and errors are those of
    `linear_divergence`.

    Returns:
        [...], in the precision of the computation; 0 and without gradient where masked.
    """
    divergence = ReverseKL() if divergence is None else divergence
    inputs = prepare(student_hidden, student_weight, teacher, divergence, top_k, mask, None)
    settings = _settings(inputs, divergence, temperature, top_k, chunk_tokens, accumulate_in)
    call = _Call(inputs, settings, inputs.weights_T, torch.is_grad_enabled())
    values_T: Tensor = _PerToken.apply(*inputs.tensors(), call)  # type: ignore[no-untyped-call]
    return inputs.scatter(values_T)


class _Call(NamedTuple):
    inputs: Inputs
    settings: Settings
    coefficient_T: Tensor
    grad_enabled: bool
    """outside: inside of `forward` it never is"""

    def wanted(self, needs_input_grad: tuple[bool, ...]) -> Wanted:
        return Wanted(*needs_input_grad[:4]) if self.grad_enabled else Wanted()


def _settings(
    inputs: Inputs,
    divergence: Divergence | SampledKL,
    temperature: float,
    top_k: int | None,
    chunk_tokens: int | None,
    accumulate_in: torch.dtype | None,
) -> Settings:
    require_positive("temperature", temperature)
    if chunk_tokens is None:
        budget = _BUFFER_BYTES_GPU if inputs.hidden_TH.is_cuda else _BUFFER_BYTES_CPU
        chunk_tokens = max(1, budget // (inputs.vocabulary * inputs.dtype.itemsize))
    require_positive("chunk_tokens", chunk_tokens)
    return Settings(divergence, temperature, top_k, inputs.vocabulary, inputs.dtype, chunk_tokens, accumulate_in)


def _run(call: _Call, tensors: tuple[Tensor | None, ...], coefficient_T: Tensor, wanted: Wanted) -> Result:
    hidden, weight, teacher_tensor, teacher_weight = tensors
    assert hidden is not None
    assert weight is not None
    teacher = call.inputs.teacher
    if isinstance(teacher, HiddenStates):
        assert teacher_tensor is not None
        packed_or_dense: Tensor | MXFP4 = teacher.weight if teacher_weight is None else teacher_weight
        teacher = replace(teacher, hidden=teacher_tensor, weight=packed_or_dense)
    elif isinstance(teacher, Logits):
        assert teacher_tensor is not None
        teacher = replace(teacher, logits=teacher_tensor)
    # Autocast would round what is computed in float32 on purpose.
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        result = ChunkLoop(hidden, weight, teacher, call.settings, coefficient_T, wanted).run()
    if not bool(torch.isfinite(result.values_T).all()):
        raise _not_finite(result.values_T, call.inputs, hidden, teacher_tensor)
    return result


class _Fused(torch.autograd.Function):
    """Σ coefficient · divergence, with its gradients computed at once."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, call = args
        result = _run(call, tuple(tensors), call.coefficient_T, call.wanted(ctx.needs_input_grad))
        # Saved, not kept as attributes: autograd frees them before it hands the gradients on, so that `.grad` takes
        # them over without a copy.
        ctx.save_for_backward(result.student, result.student_weight, result.teacher, result.teacher_weight)
        ctx.dtypes = _dtypes(tensors)
        ctx.mark_non_differentiable(result.values_T)
        ctx.set_materialize_grads(False)
        return (result.values_T * call.coefficient_T).sum(), result.values_T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        if grad_loss is None:
            return (None,) * 5
        # By a Python number, so that a half-precision gradient is multiplied in float32.
        scale = float(grad_loss)
        scaled = (g if g is None or scale == 1.0 else g * scale for g in ctx.saved_tensors)
        return (*_cast(scaled, ctx.dtypes), None)


class _PerToken(torch.autograd.Function):
    """Divergences; gradients of rows are kept, those of heads are computed when their coefficients are known."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        wanted = call.wanted(ctx.needs_input_grad)
        ctx.call, ctx.wanted, ctx.dtypes = call, wanted, _dtypes(tensors)
        ctx.again = wanted.student_weight or wanted.teacher_weight
        result = _run(call, tuple(tensors), call.coefficient_T, Wanted() if ctx.again else wanted)
        saved = tensors if ctx.again else (result.student, result.teacher)
        ctx.save_for_backward(*saved)
        return result.values_T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_T,) = grads
        if ctx.again:
            result = _run(ctx.call, ctx.saved_tensors, grad_T.detach(), ctx.wanted)
            found = result.student, result.student_weight, result.teacher, result.teacher_weight
        else:
            student, teacher = (None if g is None else g * grad_T.unsqueeze(-1) for g in ctx.saved_tensors)
            found = student, None, teacher, None
        return (*_cast(found, ctx.dtypes), None)


def _dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _cast(gradients: Iterable[Tensor | None], dtypes: list[torch.dtype | None]) -> Iterator[Tensor | None]:
    """Gradients in the dtypes of what they belong to."""
    return (g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes))


def _not_finite(values_T: Tensor, inputs: Inputs, hidden: Tensor, teacher_tensor: Tensor | None) -> BadTensor:
    row = int((~torch.isfinite(values_T)).to(torch.uint8).argmax())
    suspects = {"student_hidden": hidden, "the teacher's tensor": teacher_tensor}
    found = [
        f"{name} ({describe(tensor)}) holds an infinity or NaN there"
        for name, tensor in suspects.items()
        if tensor is not None and not bool(torch.isfinite(tensor[row]).all())
    ]
    cause = (
        "; ".join(found) or "the hidden states are finite, so a head, or a teacher that excludes tokens, is the cause"
    )
    return BadTensor(
        problem(
            f"the divergence of token {inputs.index_of(row)} is {float(values_T[row])}: {cause}",
            consequence="No loss was returned and no gradient was accumulated",
            remedy="Mask the token, correct its values, or use a divergence that is finite where the teacher gives "
            "zero probability (ForwardKL, JSD)",
        )
    )
