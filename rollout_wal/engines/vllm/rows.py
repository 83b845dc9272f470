"""A step of vLLM as rows of the log: tokens, finish reasons, log-probabilities and routes of the rollouts in it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.engine import EngineCoreOutput

from ...errors import problem
from ..base import FinishReason
from ..common.routes import columns_of
from ..common.step_log import StepLog
from .draws import Draws
from .outputs import Outputs
from .rollout import Rollout

Rows = list[tuple[EngineCoreOutput, Rollout]]


def append_step(log: StepLog[Outputs], rows: Rows, draws: Draws | None) -> list[tuple[EngineCoreOutput, Rollout, str]]:
    """Log a step.

    Args:
        draws: of the sampler, where it runs in this process.

    Returns:
        The rows that are not logged, because vLLM took another token than was drawn, and what to say about each.
    """
    if draws is None:
        _append_any(log, rows, draws)
        return []
    if _append_single(log, rows, draws):
        return []
    refused = [(o, r, why) for o, r in rows if (why := _contradiction(o, r, draws)) is not None]
    names = {o.request_id for o, *_ in refused}
    _append_any(log, [row for row in rows if row[0].request_id not in names], draws)
    return refused


def _contradiction(output: EngineCoreOutput, rollout: Rollout, draws: Draws) -> str | None:
    known = rollout.drawn(draws)
    if known is None or not output.new_token_ids or output.new_token_ids[0] == known[0]:
        return None
    return problem(
        f"vLLM took token {output.new_token_ids[0]} for rollout {rollout.spec.name!r}, and {known[0]} was drawn",
        consequence="The rollout was ended and the token not logged: its distribution is not the one asked for",
        remedy="Remove what changes logits behind PositionNoise, other logits processors say; else report it with the "
        "configuration of vLLM",
    )


def _append_single(log: StepLog[Outputs], rows: Rows, draws: Draws) -> bool:
    """The common step: one token and both log-probabilities for each row. False: it is another, nothing is done."""
    slots, tokens, logprobs, sampling, routes = [], [], [], [], []
    for output, rollout in rows:
        known = rollout.drawn(draws)
        if known is None or output.new_token_ids != [known[0]] or output.new_logprobs is None:
            return False
        slots.append(rollout.slot)
        tokens.append(known[0])
        logprobs.append(output.new_logprobs.logprobs[0, 0])
        sampling.append(known[1])
        if output.routed_experts is not None:
            routes.append(output.routed_experts[-1])
    if routes and len(routes) != len(rows):
        return False
    log.append(
        np.array(slots, np.uint16),
        np.array(tokens, np.uint32),
        np.array([rollout.took(output) for output, rollout in rows], np.uint8),
        np.array(logprobs, np.float32),
        np.array(sampling, np.float32),
        named=columns_of(np.stack(routes)) if routes else None,
    )
    return True


class _Row:
    __slots__ = ("output", "reason", "sampling", "slot")

    def __init__(
        self, slot: int, output: EngineCoreOutput, reason: FinishReason, sampling: NDArray[np.float32] | None
    ) -> None:
        self.slot, self.output, self.reason, self.sampling = slot, output, reason, sampling

    @property
    def whole(self) -> tuple[bool, bool]:
        """Which columns it has: the sampling logprob, the routes."""
        routes = self.output.routed_experts
        return self.sampling is not None, routes is not None and len(routes) >= len(self.output.new_token_ids)


def _append_any(log: StepLog[Outputs], rows: Rows, draws: Draws | None) -> None:
    """Any step: rows of several tokens or of none, and rows of which something is not known here."""
    told: list[_Row] = []
    for output, rollout in rows:
        sampling = rollout.sampling_logprobs(output, draws)
        reason = rollout.took(output)
        if output.new_token_ids:
            told.append(_Row(rollout.slot, output, reason, sampling))
    # A column is whole or absent: rows that lack one go into a frame of their own.
    for whole in sorted({row.whole for row in told}, reverse=True):
        group = [row for row in told if row.whole == whole]
        counts = [len(r.output.new_token_ids) for r in group]
        routes = [r.output.routed_experts[-n:] for r, n in zip(group, counts, strict=True)] if whole[1] else []
        log.append(
            *_columns(group),
            count_R=None if all(n == 1 for n in counts) else np.array(counts, np.uint16),
            named=columns_of(np.concatenate(routes)) if routes else None,
        )


def _columns(rows: list[_Row]) -> tuple[NDArray[Any], ...]:
    """slot, token, finish, logprob, sampling logprob: as `StepLog.append` takes them."""
    tokens = [t for r in rows for t in r.output.new_token_ids]
    logprobs = [r.output.new_logprobs.logprobs[:, 0] for r in rows if r.output.new_logprobs is not None]
    sampling = [r.sampling for r in rows if r.sampling is not None]
    columns: list[NDArray[Any]] = [
        np.array([r.slot for r in rows], np.uint16),
        np.array(tokens, np.uint32),
        np.array([r.reason for r in rows], np.uint8),
    ]
    if len(logprobs) == len(rows):
        columns.append(np.concatenate(logprobs).astype(np.float32))
        if len(sampling) == len(rows):
            columns.append(np.concatenate(sampling))
    return tuple(columns)
