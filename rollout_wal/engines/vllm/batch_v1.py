"""Who is in the batch of vLLM's model runner V1: it tells what changed at which index, and passes lists that grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from ...errors import BackendError, problem
from .draws import PLAN, Draws, Member


@dataclass(frozen=True, slots=True)
class _Followed:
    member: Member
    output: list[int]
    """vLLM's own list; -1 stands for a token that is on its device still."""


class BatchV1:
    """The requests with a plan by their index in vLLM's batch."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._at: dict[int, _Followed] = {}
        self._order: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None

    def update(self, change: BatchUpdate | None) -> None:
        """Called before each step."""
        if change is None:
            return
        self._order = None
        for index in change.removed:
            self._drop(index)
        for index, params, prompt, output in change.added:
            self._drop(index)
            plan = (params.extra_args or {}).get(PLAN)
            if plan is not None:
                if prompt is None:
                    raise BackendError(_NO_TOKENS)
                self._at[index] = _Followed(self._draws.join(plan, prompt), output)
        for a, b, direction in change.moved:
            moving, there = self._at.pop(a, None), self._at.pop(b, None)
            if moving is not None:
                self._at[b] = moving
            if there is not None:
                if direction == MoveDirectionality.SWAP:
                    self._at[a] = there
                else:
                    self._draws.leave(there.member)

    def apply(self, logits_BV: torch.Tensor) -> None:
        """Draw; see `Draws.draw`."""
        if not self._at:
            self._draws.nothing()
            return
        for index, followed in self._at.items():
            self._draws.rows.follow(followed.member.row, followed.output)
            self._draws.forbid(logits_BV, index, followed.member)
        if self._order is None:
            order = sorted(self._at)
            members = [self._at[i].member for i in order]
            self._order = (
                np.array(order, np.int64),
                np.array([m.row for m in members], np.int64),
                np.array([m.tag for m in members], np.int64),
            )
        self._draws.draw(logits_BV, *self._order)

    def _drop(self, index: int) -> None:
        gone = self._at.pop(index, None)
        if gone is not None:
            self._draws.leave(gone.member)


_NO_TOKENS: Final = problem(
    "a rollout was submitted as embeddings instead of tokens",
    consequence="It could not be resumed",
    remedy="Submit token ids",
)
