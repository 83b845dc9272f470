"""What a rollout's tokens should be: the sampler of docs/sampling.md once more, in plain Python numbers.

Shares nothing with `rollout_wal.sampling`, and is slow: one token at a time, with sorted lists and no vectors. For the
tests of every engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from ..params import SamplingParams

WORD = 0xFFFFFFFF

Row = tuple[int, float, float]
"""token, logprob, sampling logprob"""


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, on Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & WORD, (p0 >> 32) ^ c[3] ^ k1, p0 & WORD]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


def plain_gumbel(noise_key: int, position: int, token: int) -> float:
    """The scheme of docs/sampling.md, from its text."""
    words = plain_philox([token // 2, position & WORD, position >> 32, 1], [noise_key & WORD, noise_key >> 32])
    first, second = words[:2] if token % 2 == 0 else words[2:]
    bits = (first << 20) | (second >> 12)
    return -math.log(-math.log((bits + 0.5) / 2.0**52))


def plain_draw(
    logits: list[float],
    sampling: SamplingParams,
    noise_key: int,
    position: int,
    *,
    history: list[tuple[int, bool]] | None = None,
    eos: tuple[int, ...] = (),
) -> Row:
    """The token at `position`.

    Args:
        logits: of the model, one per token of the vocabulary.
        history: the tokens before, and whether each was sampled. Penalties count the sampled ones.
        eos: end-of-sequence tokens, masked with the stop tokens while fewer than `min_tokens` are sampled.
    """
    history = history or []
    model = list(logits)
    values = list(logits)
    for token in {t for t, _ in history}:
        count = sum(1 for t, was_sampled in history if t == token and was_sampled)
        r = sampling.repetition_penalty
        values[token] = values[token] / r if values[token] > 0 else values[token] * r
        values[token] -= sampling.frequency_penalty * count + (sampling.presence_penalty if count else 0.0)
    if sum(1 for _, was_sampled in history if was_sampled) < sampling.min_tokens:
        for token in (*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)):
            values[token] = -math.inf

    def log_sum(xs: list[float]) -> float:
        top = max(xs)
        return top + math.log(sum(math.exp(x - top) for x in xs))

    if sampling.temperature == 0:
        token = max(range(len(values)), key=lambda t: (values[t], -t))
        return token, model[token] - log_sum(model), 0.0
    top = max(values)
    values = [(v - top) / sampling.temperature for v in values]
    left = sorted((t for t in range(len(values)) if values[t] > -math.inf), key=lambda t: (-values[t], t))
    if sampling.top_k:
        left = left[: sampling.top_k]
    if sampling.top_p < 1:
        total, kept, mass = log_sum([values[t] for t in left]), [], 0.0
        for t in left:
            if mass >= sampling.top_p:
                break
            kept.append(t)
            mass += math.exp(values[t] - total)
        left = kept
    if sampling.min_p > 0:
        left = [t for t in left if values[t] >= values[left[0]] + math.log(sampling.min_p)]
    token = max(left, key=lambda t: (values[t] + plain_gumbel(noise_key, position, t), -t))
    return token, model[token] - log_sum(model), values[token] - log_sum([values[t] for t in left])


@dataclass
class Unbatched:
    """One rollout by itself: transformers' own attention and cache, the plain sampler.

    Args:
        model: a causal language model of transformers, in float32.
        eos: its end-of-sequence tokens.
    """

    model: Any
    eos: tuple[int, ...]

    def run(self, prompt: NDArray[Any], sampling: SamplingParams, noise_key: int) -> list[Row]:
        history = [(int(t), False) for t in prompt]
        rows: list[Row] = []
        cache = None
        new = [t for t, _ in history]
        while len(rows) < sampling.max_tokens:
            with torch.inference_mode():
                out = self.model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            row = plain_draw(
                out.logits[0, -1].tolist(), sampling, noise_key, len(history), history=history, eos=self.eos
            )
            rows.append(row)
            history.append((row[0], True))
            new = [row[0]]
            if len(rows) >= sampling.min_tokens and (
                (row[0] in self.eos and not sampling.ignore_eos) or row[0] in sampling.stop_token_ids
            ):
                break
        return rows
