"""One SGLang engine for all tests of a process, a tiny model, and the plain sampler that all is compared with.

Run with the interpreter of .venv-sglang (scripts/install_sglang.sh). SGLang keeps its configuration in globals, so
there is one embedded engine per process; servers and workers are processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout_wal.engines.base import Request
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model

#: Small enough that long prompts are prefilled in chunks, requests wait, and the KV cache runs out.
OPTIONS: dict[str, Any] = {
    "max_batch": 8,
    "prefill_chunk": 64,
    "kv_tokens": 1536,
    "server_args": {"schedule_conservativeness": 0.05},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="random kills in the kill tests")


def pytest_configure(config: pytest.Config) -> None:
    # SGLang and what it imports warn about the absence of GPUs and about themselves; nothing a caller can act on.
    for line in (
        "ignore::UserWarning",
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore::ResourceWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The independent sampler and the unbatched run of the embedded engine's tests: one oracle for all engines."""
    path = Path(__file__).parents[1] / "tests" / "engines" / "conftest.py"
    spec = importlib.util.spec_from_file_location("engines_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=60.0)


@pytest.fixture(scope="session")
def successor(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after an optimizer step: all its weights are a little different."""
    folder = tmp_path_factory.mktemp("models") / "successor"
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def engine(model: Path) -> Any:
    from rollout_wal.engines.sglang.engine import SglangEngine

    return SglangEngine.from_folder(model, **OPTIONS)


Row = tuple[int, float, float, int]
"""token, logprob, sampling logprob, finish"""


def request_of(
    slot: int,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    prefix: Sequence[int] = (),
    sampled: Sequence[bool] | None = None,
    noise_key: int = 0,
) -> Request:
    flags = np.ones(len(prefix), bool) if sampled is None else np.asarray(sampled, bool)
    return Request(slot, np.asarray(prompt, np.int32), np.asarray(prefix, np.int32), flags, sampling, noise_key)


def drive(engine: Any, requests: Sequence[Request]) -> dict[int, list[Row]]:
    """Run requests to their ends; the rows of each slot."""
    rows: dict[int, list[Row]] = {r.slot: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.unfinished:
        out = engine.step()
        for slot, *row in zip(
            out.slot_N.tolist(),
            out.token_N.tolist(),
            out.logprob_N.tolist(),
            out.sampling_logprob_N.tolist(),
            out.finish_N.tolist(),
            strict=True,
        ):
            rows[slot].append(tuple(row))
    return rows


@pytest.fixture(scope="session")
def tools() -> Any:
    """`request_of` and `drive`: test modules here cannot import one another."""

    class Tools:
        pass

    for function in (request_of, drive, wait_until):
        setattr(Tools, function.__name__, staticmethod(function))
    Tools.OPTIONS = OPTIONS  # type: ignore[attr-defined]
    return Tools


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.005)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
