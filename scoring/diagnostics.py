"""What to watch while distilling: support overlap, teacher conflict, and what the responses look like.

Shape legend: T = tokens, K = teachers, k = top tokens, V = outcomes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_kernels.checks import REFUSED

from .errors import BadRequest, problem


def support_overlap(
    student_top_Tk: NDArray[np.integer[Any]], teacher_top_Tk: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """|Top_k(S) ∩ Top_k(T)| / k of each token, on prefixes that the student visited.

    Args:
        student_top_Tk, teacher_top_Tk: ids [T, k], distinct within a token; negative ones are padding.

    Returns:
        [T]; where a token has fewer than k ids, the longer of its two lists is divided by; NaN if both are empty.
    """
    if student_top_Tk.shape != teacher_top_Tk.shape or student_top_Tk.ndim != 2 or student_top_Tk.shape[1] == 0:
        raise _bad_shape("student_top_Tk", student_top_Tk.shape, "teacher_top_Tk", teacher_top_Tk.shape)
    both = np.sort(np.concatenate((student_top_Tk, teacher_top_Tk), axis=1), axis=1)
    shared_T = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(axis=1)
    length_T = np.maximum((student_top_Tk >= 0).sum(axis=1), (teacher_top_Tk >= 0).sum(axis=1))
    share_T: NDArray[np.float64] = np.where(length_T > 0, shared_T / np.maximum(length_T, 1), np.nan)
    return share_T


def teacher_conflict(logprobs_KTV: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The mean Jensen-Shannon divergence over pairs of teachers, of each token: 0 to log 2.

        conflict_t = mean_{i<j} [ KL(p_i‖m)/2 + KL(p_j‖m)/2 ],   m = (p_i + p_j) / 2

    Args:
        logprobs_KTV: log-probabilities over the same outcomes for all teachers: the whole vocabulary, or caller-chosen
            candidates. What they leave of 1 is one more outcome. −inf is a probability of 0.

    Raises:
        BadRequest: a NaN, or a value that is no log-probability because it is above 0.
    """
    if logprobs_KTV.ndim != 3 or logprobs_KTV.shape[0] < 2:
        raise _bad_shape("logprobs_KTV", logprobs_KTV.shape, "at least two teachers", "[K, T, V]")
    bad = np.argwhere(~(logprobs_KTV <= 1e-3))  # above 0 by rounding is none
    if len(bad):
        index = bad[0].tolist()
        raise BadRequest(
            problem(
                f"logprobs_KTV holds {logprobs_KTV[tuple(index)]} at index {index}, which is no log-probability",
                consequence=REFUSED,
                remedy="Pass natural logarithms of probabilities, and leave out tokens that a teacher did not score",
            )
        )
    p = np.exp(logprobs_KTV.astype(np.float64))
    rest = np.clip(1.0 - p.sum(-1, keepdims=True), 0.0, None)
    p = np.concatenate((p, rest), axis=-1)
    p /= p.sum(-1, keepdims=True)
    pairs = list(itertools.combinations(range(len(p)), 2))
    total = np.zeros(p.shape[1])
    for i, j in pairs:
        middle = (p[i] + p[j]) / 2
        total += (_kl(p[i], middle) + _kl(p[j], middle)) / 2
    return total / len(pairs)


def repetition(token_ids_T: NDArray[np.integer[Any]], n: int = 4) -> float:
    """The share of n-grams that occurred earlier in the same response; 0.0 for one too short to repeat."""
    if len(token_ids_T) <= n:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(token_ids_T, n)
    return 1.0 - len(np.unique(windows, axis=0)) / len(windows)


@dataclass(frozen=True, slots=True)
class Response:
    """What diagnostics look at in one response.

    Args:
        token_ids_T: the response's own tokens, without the prompt.
        finish_reason: "eos", "stop_token", "max_tokens", "context", ...
        domain, teacher: labels to report by.
        versions_behind: how many policy versions ago its oldest token was sampled; None if unknown.
        scored_tokens: how many of its sampled tokens have a teacher score.
        sampled_tokens: how many tokens the policy sampled.
    """

    token_ids_T: NDArray[np.integer[Any]]
    finish_reason: str
    domain: str = ""
    teacher: str = ""
    versions_behind: int | None = None
    scored_tokens: int = 0
    sampled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ResponseStatistics:
    """Of a set of responses; means over responses unless it says otherwise. None: nothing to compute it from."""

    responses: int
    mean_length: float
    p95_length: float
    repetition: float
    truncation_rate: float
    """share that ended for lack of room: max_tokens or context"""
    eos_rate: float
    """share that ended with the end of sequence"""
    mean_versions_behind: float | None
    max_versions_behind: int | None
    score_coverage: float | None
    """scored tokens of all sampled tokens"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def response_statistics(
    responses: Iterable[Response], *, repetition_n: int = 4
) -> dict[tuple[str, str], ResponseStatistics]:
    """Statistics by (domain, teacher). Nothing is aggregated over keys."""
    groups: dict[tuple[str, str], list[Response]] = {}
    for response in responses:
        groups.setdefault((response.domain, response.teacher), []).append(response)
    return {key: _statistics(members, repetition_n) for key, members in sorted(groups.items())}


def by_label(values: Sequence[float], labels: Sequence[str]) -> Mapping[str, float]:
    """The mean of per-sequence values (overlap, conflict, divergence) by domain or teacher."""
    if len(values) != len(labels):
        raise _bad_shape("values", len(values), "labels", len(labels))
    sums: dict[str, list[float]] = {}
    for value, label in zip(values, labels):
        sums.setdefault(label, []).append(value)
    return {label: float(np.mean(members)) for label, members in sorted(sums.items())}


def _statistics(members: Sequence[Response], n: int) -> ResponseStatistics:
    lengths = [len(r.token_ids_T) for r in members]
    behind = [r.versions_behind for r in members if r.versions_behind is not None]
    sampled = sum(r.sampled_tokens for r in members)
    return ResponseStatistics(
        responses=len(members),
        mean_length=float(np.mean(lengths)),
        p95_length=float(np.percentile(lengths, 95)),
        repetition=float(np.mean([repetition(r.token_ids_T, n) for r in members])),
        truncation_rate=float(np.mean([r.finish_reason in ("max_tokens", "context") for r in members])),
        eos_rate=float(np.mean([r.finish_reason == "eos" for r in members])),
        mean_versions_behind=float(np.mean(behind)) if behind else None,
        max_versions_behind=max(behind) if behind else None,
        score_coverage=sum(r.scored_tokens for r in members) / sampled if sampled else None,
    )


def _kl(p_TV: NDArray[np.float64], q_TV: NDArray[np.float64]) -> NDArray[np.float64]:
    terms = np.where(p_TV > 0, p_TV * np.log(np.where(p_TV > 0, p_TV, 1.0) / np.where(q_TV > 0, q_TV, 1.0)), 0.0)
    total: NDArray[np.float64] = terms.sum(-1)
    return total


def _bad_shape(name: str, found: object, other: str, expected: object) -> BadRequest:
    return BadRequest(
        problem(
            f"{name} is {found}, {other} {expected}",
            consequence=REFUSED,
            remedy="Pass values whose shapes agree",
        )
    )
