"""One SGLang engine for all tests of a process, a tiny model, and the plain sampler that all is compared with.

Run with the interpreter of .venv-sglang (scripts/install_sglang.sh). SGLang keeps its configuration in globals, so
there is one embedded engine per process; servers and workers are processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import psutil
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each process takes many seconds to import SGLang, and there are as many as there are kills."""
    limit = 300 + 60 * int(config.getoption("--kills"))
    for item in items:
        item.add_marker(pytest.mark.timeout(limit))


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


def wait_until(condition: Callable[[], bool], timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.005)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Server:
    """`serve.py` in a process group of its own."""

    def __init__(self, model: Path, log: Path | None, errors: Path, **options: Any) -> None:
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env.pop("ROLLOUT_WAL_SGLANG_LOG", None)
        if log is not None:
            env["ROLLOUT_WAL_SGLANG_LOG"] = str(log)
        given = {
            "model_path": str(model),
            "dtype": "float32",
            "max_running_requests": 8,
            "max_total_tokens": 4096,
            "chunked_prefill_size": 64,
            "disable_overlap_schedule": True,
            **options,
        }
        self._errors = errors
        with errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("serve.py")), json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=env,
                start_new_session=True,
            )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.pids: dict[str, int] = {}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"event"') and line.endswith("\n"):
                self.events.append(json.loads(line))

    def wait_ready(self) -> Server:
        wait_until(lambda: bool(self.events) or self.process.poll() is not None, 280)
        assert self.events, self._errors.read_text()[-4000:]
        self.pids = self.events[0]["pids"]
        return self

    def order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def generate(
        self, name: str, prompt: Sequence[int], *, rollout: Any = None, stream: bool = False, **params: Any
    ) -> None:
        custom = params.pop("custom_params", None) or ({"rollout": rollout} if rollout is not None else None)
        params = {"temperature": 1.0, "max_new_tokens": 40, **params}
        if custom is not None:
            params["custom_params"] = custom
        self.order(do="generate", id=name, input_ids=list(prompt), params=params, stream=stream)

    def of(self, event: str, name: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event and e.get("id") == name]

    def ended(self, name: str, timeout_s: float = 150.0) -> dict[str, Any]:
        wait_until(
            lambda: bool(self.of("ended", name) or self.of("refused", name)) or self.process.poll() is not None,
            timeout_s,
        )
        assert self.process.poll() is None, self._errors.read_text()[-4000:]
        events = self.of("ended", name) or self.of("refused", name)
        return dict(events[-1].get("output") or {"error": events[-1]["error"]})

    def told(self, what: str, count: int = 1) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [e for e in self.events if e["event"] == "done" and e["do"] == what]

        wait_until(lambda: len(found()) >= count or self.process.poll() is not None)
        assert self.process.poll() is None, self._errors.read_text()[-4000:]
        return found()[count - 1]

    def end(self) -> None:
        """Everything of it is gone when this returns."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10.0)

        def alive(pid: int) -> bool:
            return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

        wait_until(lambda: not any(alive(pid) for pid in self.pids.values()), 30)


@pytest.fixture(scope="session")
def server_of(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """(log, **options) -> a server that is starting; all of them are ended with the session."""
    servers: list[Server] = []
    errors = tmp_path_factory.mktemp("servers") / "stderr"

    def make(log: Path | None, **options: Any) -> Server:
        servers.append(Server(options.pop("model", model), log, errors, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.end()
