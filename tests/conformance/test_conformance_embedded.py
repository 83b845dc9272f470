"""The embedded engine, through the suite that others run on theirs."""

from __future__ import annotations

import pytest
import torch

from rollout_wal.backend import EngineSpec
from rollout_wal.testing.conformance.backend_tests import BackendConformance
from rollout_wal.testing.conformance.engine_tests import EngineConformance
from rollout_wal.testing.conformance.settings import Conformance
from rollout_wal.testing.tiny_models import make_tiny_model

pytest_plugins = ["rollout_wal.testing.conformance"]


@pytest.fixture(scope="session")
def conformance_engine_spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    torch.set_num_threads(1)
    model = make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=30.0)
    return EngineSpec(str(model), options={"max_batch": 64})


@pytest.fixture(scope="session")
def conformance_settings(tmp_path_factory: pytest.TempPathFactory) -> Conformance:
    other = make_tiny_model(tmp_path_factory.mktemp("other"), mean_length=30.0, seed=1)
    return Conformance(other_weights=other)


class TestEngine(EngineConformance): ...


class TestBackend(BackendConformance): ...
