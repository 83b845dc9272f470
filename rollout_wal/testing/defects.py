"""Engines with one defect each, planted on purpose: a check that passes on all of them checks nothing.

Each is the embedded engine in all else. They are built through an EngineSpec, as the real one is:

    EngineSpec(model, "rollout_wal.testing.defects:ReusedSeed.from_folder", {"max_batch": 16})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine_log import EngineLog
from ..engines.base import Request, StepOutput
from ..engines.hf import HFEngine
from ..params import SamplingParams


class ReusedSeed(HFEngine):
    """Seeds a stateful generator again at the resume: position d + j gets the noise that position j had."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._shift: dict[int, int] = {}
        rows_of = self._table.sampling_rows

        def sampling_rows(row_N: Any) -> Any:
            rows = rows_of(row_N)
            shift_N = np.array([self._shift.get(slot, 0) for slot in rows.slot_N.tolist()], dtype=np.int64)
            return replace(rows, position_N=rows.position_N - shift_N)

        self._table.sampling_rows = sampling_rows  # type: ignore[method-assign]

    def add(self, request: Request, kv: Any = None) -> None:
        super().add(request, kv)
        self._shift[request.slot] = len(request.prefix)


class FreshNoiseOnResume(HFEngine):
    """Continues with another noise key: unbiased, and not the rollout that it was."""

    def add(self, request: Request, kv: Any = None) -> None:
        super().add(replace(request, noise_key=request.noise_key ^ len(request.prefix)), kv)


class LosesLastToken(HFEngine):
    """Off by one at the resume: goes on from all but the last logged token."""

    def add(self, request: Request, kv: Any = None) -> None:
        cut = slice(0, max(0, len(request.prefix) - 1))
        super().add(replace(request, prefix=request.prefix[cut], prefix_sampled=request.prefix_sampled[cut]), kv)


class PrefixAsPrompt(HFEngine):
    """Takes the tokens so far for a longer prompt: limits and penalties count from there."""

    def add(self, request: Request, kv: Any = None) -> None:
        prompt = np.concatenate((request.prompt, request.prefix)).astype(np.int32)
        none = request.prefix[:0]
        super().add(replace(request, prompt=prompt, prefix=none, prefix_sampled=none.astype(np.bool_)), kv)


class ShiftedLogprobs(HFEngine):
    """Off by one in the other column: each row has its neighbour's logprob."""

    def step(self) -> StepOutput:
        out = super().step()
        return replace(out, logprob_N=np.roll(out.logprob_N, 1) - np.float32(0.01))


class TemperedLogprobs(HFEngine):
    """Reports the logprob of the law that was drawn from as the model's own."""

    def step(self) -> StepOutput:
        out = super().step()
        return replace(out, logprob_N=out.sampling_logprob_N)


class RepeatsRows(HFEngine):
    """Every token comes twice."""

    def step(self) -> StepOutput:
        out = super().step()
        return StepOutput(*(np.repeat(getattr(out, name), 2) for name in StepOutput.__dataclass_fields__))


class DeafToAbort(HFEngine):
    """Goes on with what was given up."""

    def abort(self, slot: int) -> None:
        """Nothing."""


class OldKv(HFEngine):
    """Keeps the KV of the old weights over an update."""

    def load_weights(self, source: Path | Mapping[str, Any], version: int) -> None:
        self._keeps_kv = True
        super().load_weights(source, version)


class OneKey(HFEngine):
    """Ignores the noise key: every rollout of a prompt is the same."""

    def add(self, request: Request, kv: Any = None) -> None:
        super().add(replace(request, noise_key=1), kv)


class AcceptsAnything(HFEngine):
    """Evaluates no finish predicate on what it is given: decodes on past the end."""

    def add(self, request: Request, kv: Any = None) -> None:
        sampled = int(request.prefix_sampled.sum())
        endless = SamplingParams(
            max_tokens=max(request.sampling.max_tokens, sampled + 5),
            ignore_eos=True,
            noise_scheme=request.sampling.noise_scheme,
        )
        super().add(replace(request, sampling=endless), kv)


class ShowsEarly(HFEngine):
    """Its worker shows what it has logged before it is durable, and is in no hurry to make it so."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        log: Any = EngineLog

        def take(self: Any) -> list[Any]:
            self.sync_soon = lambda *_: None
            out = list(self.held or ())
            if self.held is not None:
                self.held.clear()
            return out

        log.take_durable = take
