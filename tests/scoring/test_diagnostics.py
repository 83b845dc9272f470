"""Diagnostics on cases small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scoring.diagnostics import (
    Response,
    by_label,
    repetition,
    response_statistics,
    support_overlap,
    teacher_conflict,
)
from scoring.errors import BadRequest


def test_support_overlap() -> None:
    student = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    teacher = np.array([[4, 3, 2, 1], [9, 8, 1, 2], [5, 6, 7, 8]])
    assert support_overlap(student, teacher).tolist() == [1.0, 0.5, 0.0]
    student, teacher = np.array([[1, 2, -1], [1, 2, -1], [-1, -1, -1]]), np.array([[3, 4, -1], [2, 5, 1], [-1, -1, -1]])
    np.testing.assert_allclose(support_overlap(student, teacher), [0.0, 2 / 3, np.nan])
    with pytest.raises(BadRequest, match="student_top_Tk"):
        support_overlap(student, teacher[:, :2])


def test_teacher_conflict() -> None:
    tiny = 1e-300
    opposite = np.log(np.array([[[1.0, tiny]], [[tiny, 1.0]]]))
    assert teacher_conflict(opposite)[0] == pytest.approx(math.log(2))
    same = np.log(np.array([[[0.3, 0.7]], [[0.3, 0.7]], [[0.3, 0.7]]]))
    assert teacher_conflict(same)[0] == pytest.approx(0.0, abs=1e-15)
    # Only candidates were scored: what they leave of 1 is an outcome, so equal candidates mean no conflict.
    part = np.log(np.array([[[0.1, 0.2]], [[0.1, 0.2]]]))
    assert teacher_conflict(part)[0] == pytest.approx(0.0, abs=1e-15)
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.125, 0.125, 0.75])
    m = (p + q) / 2
    expected = (sum(p * np.log(p / m)) + sum(q * np.log(q / m))) / 2
    assert teacher_conflict(np.log(np.stack((p, q)))[:, None])[0] == pytest.approx(expected)
    for wrong in (np.nan, np.inf, 0.5):
        broken = same.copy()
        broken[1, 0, 1] = wrong
        with pytest.raises(BadRequest, match=r"at index \[1, 0, 1\], which is no log-probability"):
            teacher_conflict(broken)
    assert teacher_conflict(np.array([[[0.0, -np.inf]], [[-np.inf, 0.0]]]))[0] == pytest.approx(math.log(2))


def test_repetition() -> None:
    assert repetition(np.arange(10)) == 0.0
    assert repetition(np.array([1, 2])) == 0.0
    # 0 0 0 0 0 0: three 4-grams, all the same.
    assert repetition(np.zeros(6, dtype=np.int32)) == pytest.approx(2 / 3)


def test_statistics_by_domain_and_teacher() -> None:
    found = response_statistics(
        [
            Response(np.arange(10), "eos", "math", "a", versions_behind=1, scored_tokens=5, sampled_tokens=10),
            Response(np.arange(30), "max_tokens", "math", "a", versions_behind=3, scored_tokens=30, sampled_tokens=30),
            Response(np.arange(4), "context", "code", "b"),
        ]
    )
    assert list(found) == [("code", "b"), ("math", "a")]
    math_a = found["math", "a"]
    assert (math_a.responses, math_a.mean_length, math_a.eos_rate, math_a.truncation_rate) == (2, 20.0, 0.5, 0.5)
    assert (math_a.mean_versions_behind, math_a.max_versions_behind, math_a.score_coverage) == (2.0, 3, 35 / 40)
    assert found["code", "b"].score_coverage is None
    assert found["code", "b"].truncation_rate == 1.0
    assert by_label([1.0, 3.0, 5.0], ["x", "x", "y"]) == {"x": 2.0, "y": 5.0}
