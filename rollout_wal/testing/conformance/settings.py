"""What the checks are run with: prompts, lengths, and how exact the numbers of an engine are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Conformance:
    """Settings of the checks.

    Args:
        prompts: token ids that the model under test knows, at least two prompts.
        max_tokens: length of the rollouts that are cut and resumed; a few dozen show what thousands would.
        splits: how many places a rollout is cut at. The first and the last token are always among them.
        logprob_atol: by how much a logprob may differ between two ways of computing it. It is the rounding of the
            engine's precision over another batch composition, not a margin for defects.
        divergent_share: share of the rollouts whose tokens may differ after a resume because two candidates were
            closer than the rounding. 0 for an engine that computes in float32; nothing else is an excuse.
        other_weights: a model folder of the same architecture with other weights, for the checks of a policy update;
            without it they are skipped.
        timeout_s: longest that a backend may take for one run.
    """

    prompts: tuple[tuple[int, ...], ...] = ((5, 80, 200, 17), (9, 33, 120, 64, 77, 41), (12, 13, 14))
    max_tokens: int = 40
    splits: int = 8
    logprob_atol: float = 1e-4
    divergent_share: float = 0.0
    other_weights: str | Path | None = None
    timeout_s: float = 120.0

    def cuts(self, length: int) -> list[int]:
        """Where a rollout of this many tokens is cut: the number of tokens that are kept, 0..length-1."""
        return sorted(set(np.linspace(0, length - 1, min(self.splits, length)).round().astype(int).tolist()))


class ConformanceError(AssertionError):
    """A backend or an engine broke a promise; the message says which, where, and with what values."""


def require(ok: bool, what: str) -> None:
    """Raises ConformanceError with `what` unless ok."""
    if not ok:
        raise ConformanceError(what)


def same_tokens(got: list[list[int]], expected: list[list[int]], settings: Conformance, what: str) -> None:
    """Each rollout equal token for token, but for the share that rounding is allowed to change."""
    require(len(got) == len(expected), f"{what}: {len(got)} rollouts instead of {len(expected)}")
    different = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    if len(different) > settings.divergent_share * len(expected):
        i = different[0]
        at = next(
            (n for n, (a, b) in enumerate(zip(got[i], expected[i])) if a != b), min(map(len, (got[i], expected[i])))
        )
        raise ConformanceError(
            f"{what}: {len(different)} of {len(expected)} rollouts differ from the uninterrupted run; number {i} first "
            f"at token {at}: {got[i][at : at + 5]} (of {len(got[i])}) instead of {expected[i][at : at + 5]} "
            f"(of {len(expected[i])})"
        )


def close_logprobs(got: ArrayLike, expected: ArrayLike, settings: Conformance, what: str) -> None:
    """Equal shapes, and values equal up to the engine's rounding."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    require(a.shape == b.shape, f"{what}: {a.shape} logprobs instead of {b.shape}")
    valid_logprobs(a, settings, what)
    if len(a) and (worst := float(np.abs(a - b).max())) > settings.logprob_atol:
        at = int(np.abs(a - b).argmax())
        raise ConformanceError(f"{what}: logprob {a[at]} at token {at} instead of {b[at]}, off by {worst:.3g}")


def valid_logprobs(value_T: NDArray[np.float64], settings: Conformance, what: str) -> None:
    """Finite and not above 0."""
    bad = np.flatnonzero(~np.isfinite(value_T) | (value_T > settings.logprob_atol))
    require(not len(bad), f"{what}: logprob {value_T[bad[0]] if len(bad) else 0} at token {bad[0] if len(bad) else 0}")
