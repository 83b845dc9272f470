"""The conformance suite on SGLang: engine and backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout_wal.backend import EngineSpec
from rollout_wal.testing.conformance.backend_tests import BackendConformance
from rollout_wal.testing.conformance.engine_tests import EngineConformance
from rollout_wal.testing.conformance.settings import Conformance

pytest_plugins = ["rollout_wal.testing.conformance"]


@pytest.fixture(scope="session")
def conformance_settings(successor: Path) -> Conformance:
    return Conformance(logprob_atol=3e-4, other_weights=successor)


@pytest.fixture(scope="session")
def conformance_engine_spec(model: Path, tools: Any) -> EngineSpec:
    return EngineSpec(str(model), "rollout_wal.engines.sglang.engine:SglangEngine.from_folder", tools.OPTIONS)


@pytest.fixture(scope="session")
def conformance_engine(engine: Any) -> Any:
    return engine


class TestEngine(EngineConformance):
    pass


class TestBackend(BackendConformance):
    pass
