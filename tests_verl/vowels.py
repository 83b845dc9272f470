"""The reward of the training runs: how much of a completion is vowels, which a tiny model can learn."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any
) -> float:
    """verl's signature."""
    return sum(c in "aeiou" for c in solution_str) / max(len(solution_str), 1)
