"""A pytest plug-in for the suites that test an engine inside its own environment: options, models, driving.

    pytest_plugins = ["rollout_wal.testing.engine_suite"]

Such a suite runs with the interpreter of an environment that has the engine, from a folder of its own. It says which
`model` the tests use; the tools are imported from here. Imports nothing heavy before a test asks for it.
(PYTEST_DONT_REWRITE: a conftest may import the tools before pytest reads its `pytest_plugins`.)
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..engines.base import Engine, Request
    from ..params import SamplingParams

Row = tuple[int, float, float, int]
"""token, logprob, sampling logprob, finish"""

#: Engines and what they import warn about the absence of GPUs and about themselves; nothing a caller can act on.
_IGNORED = ("UserWarning", "DeprecationWarning", "FutureWarning", "ResourceWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="random kills in the kill tests")


def pytest_configure(config: pytest.Config) -> None:
    for kind in _IGNORED:
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each process takes many seconds to import an engine, and there are as many as there are kills."""
    limit = 300 + 60 * int(config.getoption("--kills"))
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit))


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another cost more than they bring where several processes share the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def successor(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's `model` after an optimizer step: all its weights are a little different."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "successor"
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def module_at(path: Path, name: str) -> Any:
    """A module of another suite, with its fixtures and tests, under a name of this suite's choice."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def request_of(
    slot: int,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    prefix: Sequence[int] = (),
    sampled: Sequence[bool] | None = None,
    noise_key: int = 0,
) -> Request:
    """A request from plain lists; its prefix counts as sampled unless flags say otherwise."""
    import numpy as np

    from ..engines.base import Request

    flags = np.ones(len(prefix), bool) if sampled is None else np.asarray(sampled, bool)
    return Request(slot, np.asarray(prompt, np.int32), np.asarray(prefix, np.int32), flags, sampling, noise_key)


def drive(
    engine: Engine, requests: Sequence[Request], between: Callable[[int, dict[int, list[Row]]], None] | None = None
) -> dict[int, list[Row]]:
    """Run requests to their ends; the rows of each slot.

    Args:
        between: called before each step with its number and the rows so far.
    """
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


def wait_until(condition: Callable[[], bool], timeout_s: float = 150.0) -> None:
    """Raises AssertionError: it did not come to that in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.005)


def plain_run(folder: Path) -> Any:
    """The unbatched run of a model folder with the plain sampler: see `plain_sampler.Unbatched`."""
    import torch
    from transformers import AutoModelForCausalLM

    from .plain_sampler import Unbatched

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return Unbatched(model, (model.config.eos_token_id,))
