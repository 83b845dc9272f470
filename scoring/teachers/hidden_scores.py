"""From a model's hidden states to an item's scores.

Shape legend: R = scored positions that are known, C = most candidates of a position, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout_kernels.errors import KernelError
from rollout_kernels.logprobs import TokenLogprobs, logprobs_from_hidden, logprobs_from_logits

from ..errors import BadResult, TeacherFailed, problem
from ..items import Ragged, ScoreItem, Scores
from .base import TeacherInfo


class ScoreHead:
    """The LM head of a teacher.

    Args:
        info: of the teacher.
        weight: [V or more, H]; rows beyond the vocabulary are padding.
        cap: what the model does to logits after its head; None: nothing.
    """

    def __init__(self, info: TeacherInfo, weight: Tensor, cap: Callable[[Tensor], Tensor] | None) -> None:
        self.info, self.weight, self.cap = info, weight, cap
        self._device = weight.device

    def scores(self, item: ScoreItem, hidden_RH: Tensor) -> Scores:
        """Of an item, from the hidden states that predict its span. Raises TeacherFailed: they give no number."""
        rows, w = item.positions, item.wanted
        known = len(hidden_RH)  # one less than rows where the first token has nothing before it
        missing = rows - known
        targets = torch.from_numpy(item.token_ids[item.span[0] + missing : item.span[1]].astype(np.int64))
        some = item.candidates is not None and len(item.candidates.values) > 0
        candidates = _pad(item.candidates, missing) if some and item.candidates is not None else None
        try:
            found = self._logprobs(hidden_RH, targets.to(self._device), item, candidates)
        except KernelError as error:
            raise TeacherFailed(
                problem(
                    f"teacher {self.info.id!r} computed no score: {error}",
                    consequence="The item fails; nothing of it was stored",
                    remedy="Look for NaN in its weights; float16 and bfloat16 overflow in some models",
                )
            ) from error

        def padded(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
            if values is None:
                return None
            return np.concatenate(
                (np.zeros((missing, *values.shape[1:]), _numpy(dtype)), values.to("cpu", dtype).numpy())
            )

        tail = None
        if found.top_logprobs is not None:
            tail = (1.0 - found.top_logprobs.double().exp().sum(-1)).clamp(0.0, 1.0)
        ragged = None
        if item.candidates is not None:
            ragged = _unpad(item.candidates, padded(found.candidate_logprobs))
        hidden = None
        if w.hidden_states:
            bits = hidden_RH.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
            hidden = np.concatenate((np.zeros((missing, hidden_RH.shape[1]), np.uint16), bits))
        scores = self.info.scores_of(
            item,
            np.arange(rows) >= missing,
            logprobs=padded(found.logprob) if w.logprobs else None,
            top_ids=padded(found.top_indices, torch.int32) if w.top_k else None,
            top_logprobs=padded(found.top_logprobs) if w.top_k else None,
            tail_mass=padded(tail) if w.top_k else None,
            entropy=padded(found.entropy) if w.entropy else None,
            candidate_logprobs=ragged,
            hidden_states=hidden,
        )
        try:
            scores.check_against(item)
        except BadResult as error:
            raise TeacherFailed(str(error)) from error
        return scores

    def _logprobs(self, hidden_RH: Tensor, targets_R: Tensor, item: ScoreItem, candidates: Any) -> TokenLogprobs:
        head = self.weight[: self.info.vocabulary]
        options: dict[str, Any] = {
            "temperature": item.temperature,
            "entropy": item.wanted.entropy,
            "top_k": item.wanted.top_k,
            "candidates": None if candidates is None else candidates.to(self._device),
        }
        if self.cap is None:
            return logprobs_from_hidden(hidden_RH, head, targets_R, **options)
        parts = []
        for start in range(0, max(len(hidden_RH), 1), 256):
            rows = slice(start, start + 256)
            logits = self.cap(hidden_RH[rows].float() @ head.float().T)
            if candidates is not None:
                options["candidates"] = candidates[rows].to(self._device)
            parts.append(logprobs_from_logits(logits, targets_R[rows], **options))
        return TokenLogprobs(*(_cat([getattr(p, f) for p in parts]) for f in TokenLogprobs.__slots__))


def _pad(candidates: Ragged, skip: int) -> Tensor:
    """[rows − skip, C]; rows with fewer are filled up with id 0, whose values are not used."""
    counts = np.diff(candidates.offsets)
    out = np.zeros((len(counts), int(counts.max(initial=0))), np.int64)
    out[np.arange(out.shape[1]) < counts[:, None]] = candidates.values
    return torch.from_numpy(out[skip:])


def _unpad(candidates: Ragged, padded: Any) -> Ragged:
    if padded is None:  # no position has a candidate
        return Ragged(np.zeros(0, np.float32), candidates.offsets)
    keep = np.arange(padded.shape[1]) < np.diff(candidates.offsets)[:, None]
    return Ragged(padded[keep], candidates.offsets)


def _numpy(dtype: torch.dtype) -> Any:
    return np.float32 if dtype == torch.float32 else np.int32


def _cat(parts: list[Tensor | None]) -> Any:
    present = [p for p in parts if p is not None]
    return torch.cat(present) if present else None
