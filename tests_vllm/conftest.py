"""One vLLM engine for all tests of a process, tiny models, and the plain sampler that all is compared with.

Run with the interpreter of .venv-vllm (scripts/install_vllm.sh). vLLM keeps its configuration in globals, so there is
one embedded engine per process; servers and workers are processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout_wal.engines.base import Request
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model

#: So few KV blocks that requests are preempted, and so small a chunk that prompts are prefilled in several.
OPTIONS: dict[str, Any] = {
    "max_batch": 8,
    "dtype": "float32",
    "block_size": 32,
    "num_gpu_blocks_override": 28,
    "max_num_batched_tokens": 64,
}
FACTORY = "rollout_wal.engines.vllm.engine:VllmEngine.from_folder"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="random kills in the kill tests")


def pytest_configure(config: pytest.Config) -> None:
    # vLLM and what it imports warn about the absence of GPUs and about themselves; nothing a caller can act on.
    for kind in ("UserWarning", "DeprecationWarning", "FutureWarning", "ResourceWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")


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
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=60.0, max_context=512, head_dim=32)


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
def engine(model: Path) -> Iterator[Any]:
    from rollout_wal.engines.vllm.engine import VllmEngine

    engine = VllmEngine.from_folder(model, **OPTIONS)
    yield engine
    engine.close()


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


def drive(
    engine: Any, requests: Sequence[Request], between: Callable[[int, dict[int, list[Row]]], None] | None = None
) -> dict[int, list[Row]]:
    """Run requests to their ends; the rows of each slot. `between` is called before each step."""
    rows: dict[int, list[Row]] = {r.slot: [] for r in requests}
    for r in requests:
        engine.add(r)
    steps = 0
    while engine.unfinished:
        if between is not None:
            between(steps, rows)
        out = engine.step()
        steps += 1
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


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What test modules share: they cannot import one another."""
    return SimpleNamespace(request_of=request_of, drive=drive, wait_until=wait_until, OPTIONS=OPTIONS, FACTORY=FACTORY)
