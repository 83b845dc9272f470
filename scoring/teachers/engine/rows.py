"""From an engine's hidden states to what an item wants, row by row as the engine computes them.

The engine gives the hidden states and its own logits layer; everything after the logits is the arithmetic of the
transformers teachers (`rollout_kernels.logprobs`), so masking, temperature, entropy and the rest mean the same.

Shape legend: R = rows of an item (one for each scored token that has something before it), H = hidden size, V =
vocabulary, C = most candidates of a row, k = top tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout_kernels.errors import KernelError
from rollout_kernels.logprobs import logprobs_from_logits

Logits = Callable[[Tensor], Tensor | None]
"""Hidden states [n, H] to logits [n, at least V]. None: another rank of the engine has them."""

#: Rows whose logits are in memory together.
ROWS = 256


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted of one item, as plain types.

    Args:
        first: position, in what the engine reads, of the first row.
        targets: int64 [R], little-endian: the token that each row predicts.
        candidates: int64 [R, C], little-endian; b"" for none.
        width: C.
    """

    first: int
    targets: bytes
    temperature: float = 1.0
    entropy: bool = False
    top_k: int = 0
    candidates: bytes = b""
    width: int = 0
    hidden_states: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Rows:
    """The rows of one item, filled from the first to the last.

    Args:
        vocabulary: logits from here on are padding, and are left out.
    """

    def __init__(self, ask: Ask, vocabulary: int) -> None:
        self._ask, self._vocabulary = ask, vocabulary
        self._targets_R = torch.from_numpy(np.frombuffer(ask.targets, "<i8").astype(np.int64))
        self._candidates_RC = None
        if ask.width:
            values = np.frombuffer(ask.candidates, "<i8").astype(np.int64)
            self._candidates_RC = torch.from_numpy(values).view(-1, ask.width)
        self._done = 0
        self._parts: dict[str, list[Tensor]] = {}
        self.error = ""
        self.gap = False
        """The engine took rows from its prefix cache, so they were never seen: it has to read all of it again."""

    @property
    def next_position(self) -> int:
        """Of the first row that is still to come, in what the engine reads."""
        return self._ask.first + self._done

    def take(self, position: int, hidden_NH: Tensor, logits_of: Logits) -> None:
        """Evaluate those of the rows that are wanted and new.

        Args:
            position: of the first of them.

        After an error of the item, logits are still asked for: on several ranks they are computed together.
        """
        total = len(self._targets_R)
        if position > self.next_position and self._done < total:
            self.gap = True
            return
        start = self.next_position - position
        stop = min(self._ask.first + total - position, len(hidden_NH))
        for at in range(start, stop, ROWS):
            part = hidden_NH[at : min(at + ROWS, stop)]
            logits = logits_of(part)
            if logits is not None and not self.error:
                try:
                    self._evaluate(part, logits)
                except KernelError as error:
                    self.error = str(error)
            self._done += len(part)

    def _evaluate(self, hidden_NH: Tensor, logits_NV: Tensor) -> None:
        rows = slice(self._done, self._done + len(hidden_NH))
        device = logits_NV.device
        candidates = None if self._candidates_RC is None else self._candidates_RC[rows].to(device)
        found = logprobs_from_logits(
            logits_NV[:, : self._vocabulary],
            self._targets_R[rows].to(device),
            temperature=self._ask.temperature,
            entropy=self._ask.entropy,
            top_k=self._ask.top_k,
            candidates=candidates,
        )
        self._keep("logprobs", found.logprob, torch.float32)
        self._keep("entropy", found.entropy, torch.float32)
        self._keep("top_ids", found.top_indices, torch.int32)
        self._keep("top_logprobs", found.top_logprobs, torch.float32)
        self._keep("candidates", found.candidate_logprobs, torch.float32)
        if found.top_logprobs is not None:
            tail = (1.0 - found.top_logprobs.double().exp().sum(-1)).clamp(0.0, 1.0)
            self._keep("tail_mass", tail, torch.float32)
        if self._ask.hidden_states:
            self._keep("hidden_states", hidden_NH.to(torch.bfloat16).contiguous().view(torch.int16), torch.int16)

    def _keep(self, name: str, values: Tensor | None, dtype: torch.dtype) -> None:
        if values is not None:
            self._parts.setdefault(name, []).append(values.to("cpu", dtype, copy=True))

    def outcome(self) -> dict[str, Any]:
        """What is sent: {"arrays": bytes of each by name}, {"error": why there are none}, or {"again": True}."""
        if self.error:
            return {"error": self.error}
        if self.gap:
            return {"again": True}
        if self._done < len(self._targets_R):
            return {"error": f"the engine computed {self._done} of {len(self._targets_R)} positions"}
        return {"arrays": {name: torch.cat(parts).numpy().tobytes() for name, parts in self._parts.items()}}


def head_pieces(logits_of: Logits, vocabulary: int, like: Tensor) -> Tensor | None:
    """The LM head [vocabulary, H]: the logits of the unit vectors, which are its columns exactly.

    Args:
        like: hidden states [1, H], for dtype and device.

    Returns None where the logits are no linear map of the hidden states: a cap, a bias.
    """
    width = like.shape[1]
    columns = []
    for start in range(0, width, ROWS):
        unit = like.new_zeros(min(ROWS, width - start), width)
        unit[torch.arange(len(unit)), start + torch.arange(len(unit))] = 1.0
        logits = logits_of(unit)
        if logits is None:
            return None
        columns.append(logits[:, :vocabulary].to("cpu", like.dtype))
    head = torch.cat(columns).T.contiguous()
    # Hidden states long enough that a cap would show, and the zero vector, at which a bias would.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(8, width, generator=generator)
    probe *= 100.0 / (probe @ head.float().T).abs().max().clamp(min=1e-6)
    probe = torch.cat((probe.to(like.dtype), torch.zeros(1, width, dtype=like.dtype)))
    answer = logits_of(probe.to(like.device))
    if answer is None:
        return None
    found = answer[:, :vocabulary].to("cpu", torch.float32)
    tolerance = (1e-4 if like.dtype == torch.float32 else 0.02) * 100.0
    linear = torch.allclose(found, probe.float() @ head.float().T, atol=tolerance, rtol=0)
    return head if linear and not bool(found[-1].any()) else None
