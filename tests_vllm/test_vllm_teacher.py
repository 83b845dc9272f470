"""Teachers inside the real vLLM, on a CPU: the suite of tests/scoring, and what is vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout_wal.testing.engine_suite import module_at
from scoring.teachers.vllm import VllmTeacherSource

SCORING = Path(__file__).parents[1] / "tests" / "scoring"
_fixtures = module_at(SCORING / "conftest.py", "scoring_conftest")
_suite = module_at(SCORING / "engine_suite.py", "scoring_engine_suite")
make_items, check_scores = _fixtures.make_items, _fixtures.check_scores
globals().update({name: value for name, value in vars(_suite).items() if name.startswith("test_")})
folder, direct, teacher = _suite.folder, _suite.direct, _suite.teacher


@pytest.fixture(scope="module")
def make_source() -> Callable[..., VllmTeacherSource]:
    def make(name: str, folder: Path, **options: Any) -> VllmTeacherSource:
        return VllmTeacherSource(name, folder, threads=1, **options)

    return make


@pytest.fixture
def engine_entry() -> dict[str, Any]:
    return {"engine": "vllm"}
