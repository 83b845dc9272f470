"""The loop: logits of a few tokens at a time, their divergence, and its gradients while the logits are at hand.

Computing gradients in the forward pass is what makes this cheap: logits are made once and never kept. Peak memory is
that of a few [C, V] buffers, whatever T is.

Shape legend: T = tokens, C = tokens of a chunk, V = vocabulary that both sides share, H = hidden size of either side,
k = chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gpu import has_gpu_kernels
from .buckets import Buckets, teacher_buckets
from .divergences import Divergence, Gradients, SampledKL
from .heads import Head
from .teachers import HiddenStates, Logits, Sampled, Teacher, TopK


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same from chunk to chunk."""

    divergence: Divergence | SampledKL
    temperature: float
    top_k: int | None
    vocabulary: int
    dtype: torch.dtype
    """of the computation: float32, or float64 if any input is"""
    chunk_tokens: int
    accumulate_in: torch.dtype | None
    """of weight gradients while they are summed; None is that of the computation"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients are needed. `teacher` stands for its hidden states or its logits."""

    student: bool = False
    student_weight: bool = False
    teacher: bool = False
    teacher_weight: bool = False

    @property
    def student_side(self) -> bool:
        return self.student or self.student_weight

    @property
    def teacher_side(self) -> bool:
        return self.teacher or self.teacher_weight


@dataclass(slots=True)
class Result:
    """The divergence of each token, and the gradients of Σ coefficient · divergence.

    Gradients have the dtype of what they are gradients of. Those of float16 tensors stay in what they were computed in:
    a loss scale reaches them only in `backward`, and what float16 rounded to 0 before, it could not bring back.
    """

    values_T: Tensor
    student: Tensor | None = None
    student_weight: Tensor | None = None
    teacher: Tensor | None = None
    teacher_weight: Tensor | None = None


class ChunkLoop:
    """One evaluation. `run` may be called once.

    Args:
        hidden_TH: the student's hidden states.
        weight: the student's head [V_student, H].
        teacher: in one of its forms, with [T] in front.
        settings: see there.
        coefficient_T: what each token's divergence is multiplied by in the gradients.
        wanted: which gradients.
    """

    def __init__(
        self,
        hidden_TH: Tensor,
        weight: Tensor,
        teacher: Teacher,
        settings: Settings,
        coefficient_T: Tensor,
        wanted: Wanted,
    ) -> None:
        self.hidden_TH, self.teacher, self.settings, self.wanted = hidden_TH, teacher, settings, wanted
        self.head = Head.of(weight, settings.vocabulary, settings.dtype, hidden_TH)
        self.teacher_head = None
        if isinstance(teacher, HiddenStates):
            self.teacher_head = Head.of(teacher.weight, settings.vocabulary, settings.dtype, teacher.hidden)
        # d logits / d (hidden · weight) = 1 / temperature.
        self.scale_T = coefficient_T.to(settings.dtype) / settings.temperature
        self.result = self._allocate(weight)

    def run(self) -> Result:
        s = self.settings
        tokens = self.hidden_TH.shape[0]
        chunk = min(s.chunk_tokens, max(tokens, 1))
        # Bucketed logits have one more column, −inf, for padded indices to point at.
        width = s.vocabulary + int(self._bucketed)
        # For a teacher's logits there is a second buffer, and for what the divergence needs in between a third.
        count = (2 if self._fused else 3) if isinstance(self.teacher, HiddenStates | Logits) else 1
        buffers = [self.hidden_TH.new_empty(chunk, width, dtype=s.dtype) for _ in range(count)]
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            self._chunk(rows, [buffer[: rows.stop - rows.start] for buffer in buffers])
        self._cast()
        return self.result

    @property
    def _bucketed(self) -> bool:
        return isinstance(self.teacher, TopK) or self.settings.top_k is not None

    @property
    def _fused(self) -> bool:
        """Whether one kernel takes logits to gradients."""
        return has_gpu_kernels(self.hidden_TH) and self.settings.dtype == torch.float32 and not self._bucketed

    def _chunk(self, rows: slice, buffers: list[Tensor]) -> None:
        logits = self._prepare(buffers[0])
        self.head.logits(self.hidden_TH[rows], self.settings.temperature, logits[:, : self.settings.vocabulary])
        scale = self.scale_T[rows]
        if isinstance(self.teacher, Sampled):
            gradients, factor = self._sampled(logits, rows)
            scale = scale * factor
        elif isinstance(self.teacher, TopK):
            gradients = self._top_k(logits, rows)
        else:
            gradients = self._dense(logits, buffers[1], buffers[-1], rows)
        self.result.values_T[rows] = gradients.value_C
        self._student_gradients(gradients, rows, scale.unsqueeze(-1))
        self._teacher_gradients(gradients, rows, scale.unsqueeze(-1))

    def _dense(self, logits: Tensor, buffer: Tensor, scratch: Tensor, rows: slice) -> Gradients:
        divergence, wanted, vocabulary = self.settings.divergence, self.wanted, self.settings.vocabulary
        assert not isinstance(divergence, SampledKL)
        teacher_logits = self._prepare(buffer)
        self._teacher_logits(teacher_logits[:, :vocabulary], rows)
        if self.settings.top_k is None:
            if self._fused:
                from ..triton.divergence import evaluate

                return evaluate(
                    divergence, logits, teacher_logits, student=wanted.student_side, teacher=wanted.teacher_side
                )
            torch.log_softmax(logits, -1, out=logits)
            torch.log_softmax(teacher_logits, -1, out=teacher_logits)
            return divergence.evaluate(
                logits, teacher_logits, scratch, student=wanted.student_side, teacher=wanted.teacher_side
            )
        indices = teacher_logits[:, :vocabulary].topk(self.settings.top_k, dim=-1).indices
        student, teacher = Buckets.of_logits(logits, indices), Buckets.of_logits(teacher_logits, indices)
        coarse = _evaluate_small(divergence, student.logprobs_CB, teacher.logprobs_CB, wanted)
        return Gradients(
            coarse.value_C,
            None if coarse.student_CV is None else student.spread(coarse.student_CV),
            None if coarse.teacher_CV is None else teacher.spread(coarse.teacher_CV),
        )

    def _top_k(self, logits: Tensor, rows: slice) -> Gradients:
        divergence, teacher, vocabulary = self.settings.divergence, self.teacher, self.settings.vocabulary
        assert isinstance(teacher, TopK)
        assert not isinstance(divergence, SampledKL)
        indices, logprobs = teacher.indices[rows].long(), teacher.logprobs[rows].to(self.settings.dtype)
        unknown = indices >= vocabulary
        dropped = torch.where(unknown, logprobs.exp(), 0.0).sum(-1)
        indices = indices.masked_fill(unknown | (indices < 0), vocabulary)
        student = Buckets.of_logits(logits, indices)
        target = teacher_buckets(logprobs, indices, dropped, vocabulary)
        coarse = _evaluate_small(divergence, student.logprobs_CB, target, self.wanted)
        spread = None if coarse.student_CV is None else student.spread(coarse.student_CV)
        return Gradients(coarse.value_C, spread, None)

    def _sampled(self, logits: Tensor, rows: slice) -> tuple[Gradients, Tensor]:
        divergence, teacher = self.settings.divergence, self.teacher
        assert isinstance(teacher, Sampled)
        assert isinstance(divergence, SampledKL)
        token = teacher.tokens[rows].long().unsqueeze(-1)
        logprobs = torch.log_softmax(logits, -1, out=logits)
        value, factor = divergence.evaluate_sampled(
            logprobs.gather(-1, token).squeeze(-1), teacher.logprobs[rows].to(self.settings.dtype)
        )
        if not self.wanted.student_side:
            return Gradients(value, None, None), factor
        # ∂ log p(token) / ∂ logits = one-hot(token) − p
        gradient = logprobs.exp_().neg_()
        return Gradients(
            value, gradient.scatter_add_(-1, token, torch.ones_like(token, dtype=gradient.dtype)), None
        ), factor

    def _teacher_logits(self, out: Tensor, rows: slice) -> None:
        if isinstance(self.teacher, Logits):
            out.copy_(self.teacher.logits[rows, : self.settings.vocabulary]).div_(self.settings.temperature)
        else:
            assert self.teacher_head is not None
            assert isinstance(self.teacher, HiddenStates)
            self.teacher_head.logits(self.teacher.hidden[rows], self.settings.temperature, out)

    def _student_gradients(self, gradients: Gradients, rows: slice, scale: Tensor) -> None:
        if gradients.student_CV is None:
            return
        if self.result.student is not None:
            self.result.student[rows] = self.head.hidden_gradient(gradients.student_CV).mul_(scale)
        if self.result.student_weight is not None:
            hidden = self.hidden_TH[rows].to(self.settings.dtype) * scale
            self.head.add_weight_gradient(self.result.student_weight, gradients.student_CV, hidden)

    def _teacher_gradients(self, gradients: Gradients, rows: slice, scale: Tensor) -> None:
        if gradients.teacher_CV is None:
            return
        if isinstance(self.teacher, Logits):
            assert self.result.teacher is not None
            self.result.teacher[rows, : self.settings.vocabulary] = gradients.teacher_CV.mul_(scale)
            return
        assert isinstance(self.teacher, HiddenStates)
        assert self.teacher_head is not None
        if self.result.teacher is not None:
            self.result.teacher[rows] = self.teacher_head.hidden_gradient(gradients.teacher_CV).mul_(scale)
        if self.result.teacher_weight is not None:
            hidden = self.teacher.hidden[rows].to(self.settings.dtype) * scale
            self.teacher_head.add_weight_gradient(self.result.teacher_weight, gradients.teacher_CV, hidden)

    def _prepare(self, buffer: Tensor) -> Tensor:
        if self._bucketed:
            buffer[:, -1] = -torch.inf
        return buffer

    def _allocate(self, weight: Tensor) -> Result:
        result = Result(self.hidden_TH.new_empty(self.hidden_TH.shape[0], dtype=self.settings.dtype))
        total_dtype = self.settings.accumulate_in or self.settings.dtype
        if self.wanted.student:
            result.student = torch.zeros_like(
                self.hidden_TH, dtype=self._kept_in(self.hidden_TH.dtype, self.settings.dtype)
            )
        if self.wanted.student_weight:
            result.student_weight = torch.zeros_like(weight, dtype=total_dtype)
        if self.wanted.teacher:
            assert isinstance(self.teacher, HiddenStates | Logits)
            tensor = self.teacher.hidden if isinstance(self.teacher, HiddenStates) else self.teacher.logits
            result.teacher = torch.zeros_like(tensor, dtype=self._kept_in(tensor.dtype, self.settings.dtype))
        if self.wanted.teacher_weight:
            assert isinstance(self.teacher, HiddenStates)
            assert isinstance(self.teacher.weight, Tensor)
            result.teacher_weight = torch.zeros_like(self.teacher.weight, dtype=total_dtype)
        return result

    def _kept_in(self, dtype: torch.dtype, computed_in: torch.dtype) -> torch.dtype:
        """In which dtype gradients of tensors of this dtype are returned; see `Result`."""
        return computed_in if dtype == torch.float16 else dtype

    def _cast(self) -> None:
        """Weight gradients were summed in another dtype."""
        if self.result.student_weight is not None:
            assert isinstance(self.head.weight, Tensor)
            total = self.result.student_weight
            self.result.student_weight = total.to(self._kept_in(self.head.weight.dtype, total.dtype))
        if self.result.teacher_weight is not None:
            assert self.teacher_head is not None
            assert isinstance(self.teacher_head.weight, Tensor)
            total = self.result.teacher_weight
            self.result.teacher_weight = total.to(self._kept_in(self.teacher_head.weight.dtype, total.dtype))


def _evaluate_small(divergence: Divergence, ls_CB: Tensor, lt_CB: Tensor, wanted: Wanted) -> Gradients:
    return divergence.evaluate(
        ls_CB, lt_CB, torch.empty_like(ls_CB), student=wanted.student_side, teacher=wanted.teacher_side
    )
