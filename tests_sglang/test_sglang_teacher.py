"""Teachers inside the real SGLang, on a CPU: the suite of tests/scoring, and what is SGLang's own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scoring.teachers.sglang import SglangTeacherSource


def _take(name: str) -> Any:
    """A module of tests/scoring, with its fixtures and tests."""
    spec = importlib.util.spec_from_file_location(
        f"scoring_{name}", Path(__file__).parents[1] / "tests" / "scoring" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_fixtures, _suite = _take("conftest"), _take("engine_suite")
make_items, check_scores = _fixtures.make_items, _fixtures.check_scores
globals().update({name: value for name, value in vars(_suite).items() if name.startswith("test_")})
folder, direct, teacher = _suite.folder, _suite.direct, _suite.teacher


@pytest.fixture(scope="module")
def make_source() -> Callable[..., SglangTeacherSource]:
    def make(name: str, folder: Path, **options: Any) -> SglangTeacherSource:
        return SglangTeacherSource(name, folder, threads=1, **options)

    return make


@pytest.fixture
def engine_entry() -> dict[str, Any]:
    return {"engine": "sglang"}
