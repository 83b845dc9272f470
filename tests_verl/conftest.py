"""A small Ray cluster on this machine, and a tiny model. Run with the interpreter of .venv-verl."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Every process of Ray learns of the rollout engine that the adapter adds to verl.
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "rollout_wal.trainers.verl.engine")
# And finds what is defined in these tests.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

import pytest
import ray

from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ray_host import start_host

sys.path.insert(0, str(Path(__file__).parent))
from hosts import stop


def pytest_configure(config: pytest.Config) -> None:
    # Ray, verl and what they import warn about the absence of GPUs and about themselves.
    for kind in ("UserWarning", "DeprecationWarning", "FutureWarning", "ResourceWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=40.0)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="tests", configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def make_host(cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts hosts on one directory, by name; they are gone after the module's tests, in good order."""
    folder = tmp_path_factory.mktemp("host")
    started: list[Any] = []

    def start(name: str, **options: Any) -> Any:
        handle = start_host(model, folder / "wal", name=name, slots=8, segment_bytes=1 << 18, num_cpus=0.5, **options)
        started.append(handle)
        return handle

    yield start
    for handle in started:
        stop(handle)
