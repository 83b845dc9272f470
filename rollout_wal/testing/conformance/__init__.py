"""A pytest plug-in that tests somebody's engine or backend: cut, killed and resumed at every interesting moment.

    pytest_plugins = ["rollout_wal.testing.conformance"]

    from rollout_wal.testing.conformance.engine_tests import EngineConformance
    from rollout_wal.testing.conformance.backend_tests import BackendConformance

    @pytest.fixture(scope="session")
    def conformance_engine_spec():
        return EngineSpec("models/mine", "my_package.engine:build")

    class TestMyEngine(EngineConformance): ...
    class TestMyBackend(BackendConformance): ...

This module holds the fixtures only, and imports nothing before a test asks for one. See `docs/conformance.md`.
(PYTEST_DONT_REWRITE: test modules may import the classes before pytest reads their `pytest_plugins`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ...backend import EngineSpec
    from ...engines.base import Engine
    from .backend_checks import KilledBackend
    from .live_checks import LiveBackend, LiveRun
    from .settings import Conformance


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: longer than a few seconds")


@pytest.fixture(scope="session")
def conformance_settings() -> Conformance:
    """Override to change prompts, lengths and tolerances."""
    from .settings import Conformance

    return Conformance()


@pytest.fixture(scope="session")
def conformance_engine_spec() -> EngineSpec:
    """Override with the engine under test."""
    raise pytest.UsageError("define a session fixture `conformance_engine_spec` that returns an EngineSpec")


@pytest.fixture(scope="session")
def conformance_engine(conformance_engine_spec: EngineSpec) -> Iterator[Engine]:
    """One engine in this process, for all tests of EngineConformance. Each leaves it empty."""
    engine = conformance_engine_spec.build(0)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def conformance_backend_options() -> dict[str, Any]:
    """Override to pass more to RolloutBackend: kv, policy, slots, ..."""
    return {}


@pytest.fixture(scope="session")
def conformance_backend(
    conformance_engine_spec: EngineSpec,
    conformance_settings: Conformance,
    conformance_backend_options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[KilledBackend]:
    """One running backend with a worker that can be killed at named moments, and its uninterrupted runs."""
    from .backend_checks import KilledBackend

    with KilledBackend(
        conformance_engine_spec,
        tmp_path_factory.mktemp("conformance"),
        conformance_settings,
        conformance_backend_options,
    ) as backend:
        yield backend


@pytest.fixture(scope="session")
def conformance_live_backend() -> Callable[[], LiveBackend]:
    """Override with a function that starts the backend under test."""
    raise pytest.UsageError("define a session fixture `conformance_live_backend` that returns a function () -> backend")


@pytest.fixture(scope="session")
def conformance_live_keyed() -> bool:
    """Override with False for a backend whose noise is not a function of (seed, position)."""
    return True


@pytest.fixture(scope="session")
def conformance_live_calm(
    conformance_live_backend: Callable[[], LiveBackend], conformance_settings: Conformance
) -> LiveRun:
    """The uninterrupted run of that backend."""
    from .live_checks import run_live

    return run_live(conformance_live_backend, conformance_settings)


@pytest.fixture
def conformance_folder(tmp_path: Path) -> Path:
    """For the logs of one test."""
    return tmp_path
