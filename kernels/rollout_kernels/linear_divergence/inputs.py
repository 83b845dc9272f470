"""What a divergence is computed from: checked, flattened to [T, ...], and without the masked tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import REFUSED, require_device, require_dtype, require_finite, require_shape, require_sizes
from ..errors import BadOption, BadTensor, problem
from ..mxfp4 import MXFP4
from .divergences import Divergence, SampledKL
from .teachers import HiddenStates, Logits, Sampled, Teacher, TopK

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, slots=True)
class Inputs:
    """T unmasked tokens."""

    hidden_TH: Tensor
    weight_VH: Tensor
    teacher: Teacher
    weights_T: Tensor
    """constants, in the precision of the computation"""
    vocabulary: int
    """the common prefix of both sides' token ids"""
    dtype: torch.dtype
    leading: tuple[int, ...]
    """the leading dimensions that the caller's tensors have"""
    kept: Tensor | None
    """int64 [T], where the unmasked tokens were in the flattened leading dimensions; None if all are"""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What can require gradients: the student's hidden states and head, the teacher's tensor and dense head."""
        if isinstance(self.teacher, HiddenStates):
            head = self.teacher.weight
            return self.hidden_TH, self.weight_VH, self.teacher.hidden, head if isinstance(head, Tensor) else None
        if isinstance(self.teacher, Logits):
            return self.hidden_TH, self.weight_VH, self.teacher.logits, None
        return self.hidden_TH, self.weight_VH, None, None

    def scatter(self, values_T: Tensor) -> Tensor:
        """Back to the caller's leading dimensions, 0 where masked."""
        if self.kept is None:
            return values_T.view(self.leading)
        size = torch.Size(self.leading).numel()
        return values_T.new_zeros(size).index_copy(0, self.kept, values_T).view(self.leading)

    def index_of(self, row: int) -> list[int]:
        """Where an unmasked token is in the caller's leading dimensions."""
        flat = torch.tensor(row if self.kept is None else int(self.kept[row]))
        return [int(i) for i in torch.unravel_index(flat, self.leading)] if self.leading else []


def prepare(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    divergence: Divergence | SampledKL,
    top_k: int | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
) -> Inputs:
    """Check everything before anything is computed.

    Raises:
        BadTensor, BadOption: see `linear_divergence`.
    """
    require_dtype("student_hidden", hidden, _FLOATS)
    require_dtype("student_weight", weight, _FLOATS)
    if hidden.dim() == 0:
        require_shape("student_hidden", hidden, (None, None), "the last dimension is the hidden size")
    require_shape("student_weight", weight, (None, hidden.shape[-1]), f"student_hidden has {list(hidden.shape)}")
    require_device("student_weight", weight, hidden.device, "student_hidden")
    leading = tuple(hidden.shape[:-1])
    vocabulary = _check_teacher(teacher, leading, weight.shape[0], hidden.device)
    _check_options(teacher, divergence, top_k, vocabulary)
    if vocabulary == 0:
        require_shape("student_weight", weight, (1, hidden.shape[-1]), "a vocabulary has at least one token")
    kept = _kept(mask, leading, hidden.device)

    def select(tensor: Tensor, trailing: int) -> Tensor:
        """Flatten the leading dimensions, and leave masked tokens out."""
        flat = tensor.reshape(-1, *tensor.shape[tensor.dim() - trailing :])
        return flat if kept is None else flat.index_select(0, kept)

    match teacher:
        case HiddenStates():
            teacher = replace(teacher, hidden=select(teacher.hidden, 1))
        case Logits():
            teacher = replace(teacher, logits=select(teacher.logits, 1))
        case TopK():
            teacher = TopK(select(teacher.indices, 1), select(teacher.logprobs, 1))
            check_top_k(teacher)
        case Sampled():
            teacher = Sampled(select(teacher.tokens, 0), select(teacher.logprobs, 0))
            _check_sampled(teacher, vocabulary)
    hidden_TH = select(hidden, 1)
    dtype = _computation_dtype(hidden, weight, teacher)
    if token_weights is None:
        weights_T = hidden_TH.new_ones(hidden_TH.shape[0], dtype=dtype)
    else:
        weights_T = select(_checked_weights(token_weights, leading, hidden.device), 0).to(dtype)
    return Inputs(hidden_TH, weight, teacher, weights_T, vocabulary, dtype, leading, kept)


def _check_teacher(teacher: Teacher, leading: tuple[int, ...], vocabulary: int, device: torch.device) -> int:
    """Shapes, dtypes and devices; returns the size of the common vocabulary."""
    why = f"student_hidden has the leading dimensions {list(leading)}"
    match teacher:
        case HiddenStates(hidden, head):
            require_dtype("teacher.hidden", hidden, _FLOATS)
            require_shape("teacher.hidden", hidden, (*leading, None), why)
            require_device("teacher.hidden", hidden, device, "student_hidden")
            shape = f"teacher.hidden has {list(hidden.shape)}"
            if isinstance(head, MXFP4):
                require_device("teacher.weight", head.scales, device, "student_hidden")
            else:
                require_dtype("teacher.weight", head, _FLOATS)
                require_device("teacher.weight", head, device, "student_hidden")
            require_sizes("teacher.weight", head.shape, (None, hidden.shape[-1]), shape)
            return min(vocabulary, head.shape[0])
        case Logits(logits):
            require_dtype("teacher.logits", logits, _FLOATS)
            require_shape("teacher.logits", logits, (*leading, None), why)
            require_device("teacher.logits", logits, device, "student_hidden")
            return min(vocabulary, logits.shape[-1])
        case TopK(indices, logprobs):
            require_dtype("teacher.indices", indices, _INTEGERS)
            require_dtype("teacher.logprobs", logprobs, _FLOATS)
            require_shape("teacher.indices", indices, (*leading, None), why)
            require_shape("teacher.logprobs", logprobs, indices.shape, "teacher.indices has that shape")
            _refuse_gradient("teacher.logprobs", logprobs)
            require_device("teacher.indices", indices, device, "student_hidden")
            require_device("teacher.logprobs", logprobs, device, "student_hidden")
        case Sampled(tokens, logprobs):
            require_dtype("teacher.tokens", tokens, _INTEGERS)
            require_dtype("teacher.logprobs", logprobs, _FLOATS)
            require_shape("teacher.tokens", tokens, leading, why)
            require_shape("teacher.logprobs", logprobs, leading, why)
            _refuse_gradient("teacher.logprobs", logprobs)
            require_device("teacher.tokens", tokens, device, "student_hidden")
            require_device("teacher.logprobs", logprobs, device, "student_hidden")
    return vocabulary


def _check_options(teacher: Teacher, divergence: Divergence | SampledKL, top_k: int | None, vocabulary: int) -> None:
    form = type(teacher).__name__
    if isinstance(teacher, Sampled) is not isinstance(divergence, SampledKL):
        raise BadOption(
            problem(
                f"{divergence} cannot be computed from a teacher given as {form}",
                consequence=REFUSED,
                remedy="Sampled goes with SampledKL; the other forms go with ReverseKL, ForwardKL and JSD",
            )
        )
    if top_k is None:
        return
    if not isinstance(teacher, HiddenStates | Logits):
        raise BadOption(
            problem(
                f"top_k={top_k} was given with a teacher given as {form}, which has its own tokens",
                consequence=REFUSED,
                remedy="Leave top_k out",
            )
        )
    if not 1 <= top_k <= vocabulary:
        raise BadOption(
            problem(
                f"top_k={top_k} is out of range: 1 to the common vocabulary of {vocabulary}",
                consequence=REFUSED,
                remedy="Pass a top_k within the range",
            )
        )


def check_top_k(teacher: TopK) -> None:
    """Contents: distinct indices, and log-probabilities that are some."""
    used = teacher.indices >= 0
    ordered = teacher.indices.long().sort(-1).values
    if ordered.shape[-1] > 1:
        same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        _refuse_rows(same.any(-1), "teacher.indices repeats an index", "Each token may appear once per position")
    logprobs = teacher.logprobs
    bad = used & ~((logprobs <= 1e-3) & (logprobs > -torch.inf))
    _refuse_rows(
        bad.any(-1),
        "teacher.logprobs holds a value that is no log-probability (NaN, infinite or positive)",
        "Pass natural logarithms of probabilities, and an index of -1 where there is none",
    )
    mass = torch.where(used, logprobs.float(), -torch.inf).exp().sum(-1)
    _refuse_rows(
        mass > 1.01,
        "teacher.logprobs sums to a probability of more than 1",
        "Pass log-probabilities over the whole vocabulary, not logits",
    )


def _check_sampled(teacher: Sampled, vocabulary: int) -> None:
    _refuse_rows(
        (teacher.tokens < 0) | (teacher.tokens.long() >= vocabulary),
        f"teacher.tokens holds an id outside the student's vocabulary of {vocabulary}",
        "Mask positions that hold no sampled token",
    )
    _refuse_rows(
        ~torch.isfinite(teacher.logprobs),
        "teacher.logprobs holds an infinity or NaN",
        "Mask positions that the teacher did not score",
    )


def _refuse_rows(bad_T: Tensor, what: str, remedy: str) -> None:
    if bool(bad_T.any()):
        row = int(bad_T.to(torch.uint8).argmax())
        raise BadTensor(problem(f"{what} at unmasked token {row}", consequence=REFUSED, remedy=remedy))


def _refuse_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise BadTensor(
            problem(
                f"{name} requires a gradient, and none is computed for it",
                consequence=f"{REFUSED}: it would silently stay without one",
                remedy=f"Pass {name}.detach()",
            )
        )


def _checked_weights(token_weights: Tensor, leading: tuple[int, ...], device: torch.device) -> Tensor:
    require_dtype("token_weights", token_weights, _FLOATS)
    require_shape("token_weights", token_weights, leading, "one weight for each token of student_hidden")
    require_device("token_weights", token_weights, device, "student_hidden")
    _refuse_gradient("token_weights", token_weights)
    require_finite("token_weights", token_weights)
    return token_weights


def _kept(mask: Tensor | None, leading: tuple[int, ...], device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    require_dtype("mask", mask, (torch.bool,))
    require_shape("mask", mask, leading, "one entry for each token of student_hidden")
    require_device("mask", mask, device, "student_hidden")
    return None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(-1)


def _computation_dtype(hidden: Tensor, weight: Tensor, teacher: Teacher) -> torch.dtype:
    tensors = [hidden, weight]
    if isinstance(teacher, HiddenStates):
        tensors += [teacher.hidden, *([teacher.weight] if isinstance(teacher.weight, Tensor) else [])]
    elif isinstance(teacher, Logits):
        tensors.append(teacher.logits)
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
