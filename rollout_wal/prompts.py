"""Prompts: what makes one valid, and what makes two sets of them the same cohort."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .engines.base import EngineInfo
from .errors import BadPrompt, problem
from .params import SamplingParams


def check_prompt(prompt: ArrayLike, info: EngineInfo | None) -> NDArray[np.int32]:
    """The prompt as int32 [T].

    Raises:
        BadPrompt: what is wrong with it, and where.
    """

    def bad(what: str, remedy: str) -> BadPrompt:
        return BadPrompt(problem(what, consequence="The rollout was not begun and nothing was logged", remedy=remedy))

    tokens = np.asarray(prompt)
    if tokens.size == 0:
        raise bad("the prompt is empty", "Pass at least one token, for instance the beginning-of-sequence token")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise bad(
            f"the prompt has dtype {tokens.dtype} and shape {tokens.shape}", "Pass a flat sequence of integer token ids"
        )
    limit = info.vocab_size if info is not None else 1 << 31
    outside = np.flatnonzero((tokens < 0) | (tokens >= limit))
    if len(outside):
        at = int(outside[0])
        raise bad(
            f"prompt token {int(tokens[at])} at position {at} is out of the vocabulary of {limit}",
            "Tokenise the prompt with the model's own tokenizer",
        )
    if info is not None and len(tokens) >= info.max_context:
        raise bad(
            f"the prompt has {len(tokens)} tokens; a context of {info.max_context} leaves no room for one more",
            "Shorten the prompt, or use a model with a longer context",
        )
    return tokens.astype(np.int32)


def cohort_digest(
    prompts: Sequence[NDArray[np.int32]],
    sampling: SamplingParams,
    *,
    group_size: int,
    seed: int | None,
    noise: str,
    turns: Mapping[str, Any] | None = None,
) -> str:
    """What makes two calls the same cohort. BLAKE2b-128, hex. `turns` as in `records.Begin`; without, as if unknown."""
    h = hashlib.blake2b(digest_size=16)
    h.update(repr((sorted(sampling.to_dict().items()), group_size, seed, noise, len(prompts))).encode())
    for prompt in prompts:
        h.update(len(prompt).to_bytes(8, "little"))
        h.update(np.ascontiguousarray(prompt, "<i4").tobytes())
    if turns:
        h.update(repr(sorted(turns.items())).encode())
    return h.hexdigest()


def cohort_seed(name: str) -> int:
    """The seed of a cohort whose caller gave none. Were it the same for all of them, every step of a training run would
    draw the same noise, and while the policy moves little, say much the same again."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def rollout_seed(seed: int, index: int) -> int:
    """The 64-bit seed of the index-th rollout of a cohort: independent of everything but the two numbers."""
    h = hashlib.blake2b(seed.to_bytes(16, "little", signed=True) + index.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(h.digest(), "little")
