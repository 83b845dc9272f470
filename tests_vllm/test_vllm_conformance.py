"""The project's conformance suite on the vLLM adapter: as an engine, and under a backend that is killed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_wal.backend import EngineSpec
from rollout_wal.testing.conformance.backend_tests import BackendConformance
from rollout_wal.testing.conformance.engine_tests import EngineConformance
from rollout_wal.testing.conformance.settings import Conformance


@pytest.fixture(scope="session")
def conformance_engine_spec(model: Path, tools: SimpleNamespace) -> EngineSpec:
    return EngineSpec(str(model), factory=tools.FACTORY, options=tools.OPTIONS)


@pytest.fixture(scope="session")
def conformance_settings(successor: Path) -> Conformance:
    return Conformance(other_weights=successor)


@pytest.fixture(scope="session")
def conformance_engine(engine: Any) -> Any:
    """The one that this process has: vLLM keeps its configuration in globals."""
    return engine


class TestVllmEngine(EngineConformance):
    pass


class TestVllmBackend(BackendConformance):
    pass
