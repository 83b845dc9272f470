"""Driving an engine directly, without a log: what each slot produced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from ...engines.base import Engine, FinishReason, Request, StepOutput
from ...params import SamplingParams
from .settings import require

#: Steps without any output after which an engine is taken to hang.
_IDLE_STEPS_MAX = 10_000
_COLUMNS = ("slot_N", "token_N", "logprob_N", "sampling_logprob_N", "finish_N")
_TYPES = ("uint16", "uint32", "float32", "float32", "uint8")


@dataclass(slots=True)
class Output:
    """What one slot produced."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish: FinishReason = FinishReason.RUNNING


def request(
    slot: int,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    prefix: Sequence[int] = (),
    prefix_sampled: Sequence[bool] | None = None,
    noise_key: int = 1,
) -> Request:
    """A Request from plain lists; all of the prefix was sampled unless told otherwise."""
    sampled = np.ones(len(prefix), np.bool_) if prefix_sampled is None else np.asarray(prefix_sampled, np.bool_)
    return Request(slot, np.asarray(prompt, np.int32), np.asarray(prefix, np.int32), sampled, sampling, noise_key)


def cut(whole: Request, tokens: Sequence[int], at: int, slot: int) -> Request:
    """The same rollout, to be resumed with the first `at` of its output tokens."""
    return replace(whole, slot=slot, prefix=np.asarray(tokens[:at], np.int32), prefix_sampled=np.ones(at, np.bool_))


def take(step: StepOutput, outputs: dict[int, Output]) -> None:
    """Add the rows of a step, having checked their form."""
    columns = [getattr(step, name) for name in _COLUMNS]
    types = tuple(c.dtype.name for c in columns)
    require(types == _TYPES, f"a step has columns of types {types} instead of {_TYPES}")
    require(len({len(c) for c in columns}) == 1, f"a step has columns of lengths {[len(c) for c in columns]}")
    slots = step.slot_N.tolist()
    require(len(set(slots)) == len(slots), f"a step has two rows of one slot: {sorted(slots)}")
    for slot, token, logprob, sampling_logprob, finish in zip(*(c.tolist() for c in columns), strict=True):
        require(slot in outputs, f"a step has a row of slot {slot}, which runs nothing")
        out = outputs[slot]
        require(out.finish == FinishReason.RUNNING, f"slot {slot} goes on after it finished ({out.finish.name})")
        out.tokens.append(token)
        out.logprobs.append(logprob)
        out.sampling_logprobs.append(sampling_logprob)
        out.finish = FinishReason(finish)


def drive(engine: Engine, requests: Sequence[Request], *, steps: int | None = None) -> dict[int, Output]:
    """Add the requests and step until all have finished, or for `steps` steps. Outputs by slot."""
    outputs = {r.slot: Output() for r in requests}
    for each in requests:
        engine.add(each)
    advance(engine, outputs, steps=steps)
    return outputs


def advance(engine: Engine, outputs: dict[int, Output], *, steps: int | None = None) -> None:
    """Go on stepping, into the same outputs."""
    idle = taken = 0
    while engine.unfinished and (steps is None or taken < steps):
        step = engine.step()
        take(step, outputs)
        taken += 1
        idle = 0 if len(step.slot_N) else idle + 1
        require(
            idle < _IDLE_STEPS_MAX, f"{idle} steps without output, while {engine.unfinished} requests are unfinished"
        )
    if steps is None:
        hanging = [slot for slot, out in outputs.items() if out.finish == FinishReason.RUNNING]
        require(not hanging, f"the engine says that nothing is unfinished, but slots {hanging} never finished")


@contextmanager
def emptied(engine: Engine, slots: range = range(64)) -> Iterator[Engine]:
    """The engine, with these slots free again afterwards, whatever happens."""
    try:
        yield engine
    finally:
        for slot in slots:
            engine.abort(slot)
