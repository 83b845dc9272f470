"""What an inference engine is to this project: something that advances many rollouts by one token a step.

An engine knows nothing of logs, attempts or delivery. It is told a *slot*, the tokens so far and where the noise
comes from, and it returns columns. Whoever drives it logs each step before anything depends on it.

Shape legend: N = running requests in this step (one row each), T = tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..params import SamplingParams


class FinishReason(IntEnum):
    """Why a rollout ended. The numbers are on disk: never renumber, only add."""

    RUNNING = 0
    EOS = 1
    """The model's own end of sequence, which is the last token."""
    STOP_TOKEN = 2
    """One of the caller's stop tokens, which is the last token."""
    STOP_STRING = 3
    """One of the caller's stop strings; the Finish record says how many tokens count."""
    MAX_TOKENS = 4
    """`max_tokens` tokens were sampled."""
    CONTEXT = 5
    """The model's context is full."""
    TURN_LIMIT = 6
    """The policy asked for a tool once more than `turns_max` allows. Never an engine's: see `rollout_wal.episode`."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Who produces the tokens (invariant I6). Digests are lower-case hex of BLAKE2b-128."""

    engine: str
    engine_version: str
    architecture_digest: str
    """Over the model's configuration: every field that changes what the weights mean."""
    weights_digest: str
    """Over the names, shapes, dtypes and bytes of all parameters."""
    tokenizer_digest: str
    chat_template_digest: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    dtype: str = "float32"
    extras: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One rollout, from its first token or from anywhere in its middle.

    Args:
        slot: the caller's name for it while it runs; 0..65535, unique among running requests.
        prompt: int32 [T_prompt], at least one token.
        prefix: int32 [T_prefix], what follows the prompt so far: sampled and observed tokens in order.
        prefix_sampled: bool [T_prefix], True where the policy sampled the token, False where it was observed
            (tool output). Only sampled tokens count towards max_tokens and min_tokens.
        sampling: how to draw.
        noise_key: unsigned 64-bit key of the noise. The noise of the token at absolute position p (index into
            prompt + prefix + output) is a pure function of (noise_key, p, token id).
    """

    slot: int
    prompt: NDArray[np.int32]
    prefix: NDArray[np.int32]
    prefix_sampled: NDArray[np.bool_]
    sampling: SamplingParams
    noise_key: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One row per request that produced a token in this step. Rows of one slot are never repeated in a step.

    logprob is log p(token) under the model's own distribution (temperature 1, no filter or penalty);
    sampling_logprob under the distribution it was drawn from (penalties, temperature and filters applied;
    0 at temperature 0, where the draw is certain).
    """

    slot_N: NDArray[np.uint16]
    token_N: NDArray[np.uint32]
    logprob_N: NDArray[np.float32]
    sampling_logprob_N: NDArray[np.float32]
    finish_N: NDArray[np.uint8]
    """FinishReason of each row; 0 while it runs on. A finished slot is free as soon as the step returns."""


@runtime_checkable
class Engine(Protocol):
    """The seam between this project and an inference engine. Not thread-safe: one thread drives it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def policy_version(self) -> int: ...

    @property
    def unfinished(self) -> int:
        """Requests added and neither finished nor aborted."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request; it joins at a later step.

        Raises:
            BadPrompt: empty, token ids out of the vocabulary, or no room in the context for one more token.
            BadSampling: parameters that this engine cannot honour.
            BadInput: a slot that is already in use.
        """
        ...

    def abort(self, slot: int) -> None:
        """Forget a request between steps. Unknown slots are ignored: it may have finished in the last step."""
        ...

    def step(self) -> StepOutput:
        """Advance: chunked prefill for some, one token for others. May return no rows (prefill only)."""
        ...

    def load_weights(self, source: Path | Mapping[str, Any], version: int) -> None:
        """Replace the weights between steps, and recompute what depended on the old ones.

        Raises:
            ArchitectureMismatch: names, shapes or configuration differ; the old weights stay in force.
        """
        ...

    def close(self) -> None: ...
