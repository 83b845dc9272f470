"""Who is in the batch of vLLM's model runner V2: requests have slots, and their tokens are on the device.

A slot's tokens are read once, when its request joins the batch. After that nothing has to be read: vLLM takes the token
that was drawn here, because no other is left, so the sequence is known on the host one step before vLLM tells it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from ...errors import BackendError, problem
from .draws import PLAN, Draws, Member


class BatchV2:
    """The requests with a plan by their slot. vLLM tells when a slot is taken, not when it falls free."""

    def __init__(self, draws: Draws, states: LogitsProcRequestState) -> None:
        self._draws = draws
        self._states = states
        self._at: dict[int, Member] = {}
        self._joining: dict[int, dict[str, Any]] = {}

    def add(self, slot: int, extra_args: dict[str, Any] | None) -> bool:
        """A request takes a slot: a new one, or one that was preempted. Returns whether it is drawn here."""
        gone = self._at.pop(slot, None)
        if gone is not None:
            self._draws.leave(gone)
        self._joining.pop(slot, None)
        plan = (extra_args or {}).get(PLAN)
        if plan is None:
            return False
        self._joining[slot] = plan
        return True

    def join(self) -> None:
        """Read the tokens of those that were added. vLLM has written them to its device by now."""
        for slot, plan in self._joining.items():
            self._at[slot] = self._draws.join(plan, self._tokens(slot, 0, int(self._states.prefill_len.np[slot])))
        self._joining.clear()

    def apply(self, logits_BV: torch.Tensor, ctx: LogitsContext) -> None:
        """Draw; see `Draws.draw`.

        Raises:
            BackendError: unusable logits, or several rows of a request.
        """
        slots = ctx.idx_mapping_np.tolist()
        if len(slots) != logits_BV.shape[0]:
            raise BackendError(
                problem(
                    f"vLLM asks for {logits_BV.shape[0]} tokens of {len(slots)} requests in one step",
                    consequence="None of them was drawn: several draws at a position are not the policy's",
                    remedy="Turn speculative decoding off",
                )
            )
        index, members = [], []
        # Without speculation, the upper bound of a request's tokens is their number.
        for at, (slot, length) in enumerate(zip(slots, ctx.seq_lens_upper_bound_np.tolist())):
            member = self._at.get(slot)
            # A prompt that is computed in parts has logits after each part, of which vLLM drops the token.
            if member is None or length < member.start:
                continue
            if not self._draws.rows.reach(member.row, length):
                self._draws.rows.follow(member.row, self._tokens(slot, member.start, length))
            self._draws.forbid(logits_BV, at, member)
            index.append(at)
            members.append(member)
        if not members:
            self._draws.nothing()
            return
        self._draws.draw(
            logits_BV,
            np.array(index, np.int64),
            np.array([m.row for m in members], np.int64),
            np.array([m.tag for m in members], np.int64),
        )

    def _tokens(self, slot: int, start: int, stop: int) -> list[int]:
        """Waits for the device."""
        tokens: list[int] = self._states.all_token_ids.gpu[slot, start:stop].cpu().tolist()
        return tokens
