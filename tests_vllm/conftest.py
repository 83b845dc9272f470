"""One vLLM engine for all tests of a process, tiny models, and the plain sampler that all is compared with.

Run with the interpreter of .venv-vllm (scripts/install_vllm.sh). vLLM keeps its configuration in globals, so there is
one embedded engine per process; servers and workers are processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("MODEL_RUNNER") == "v2":
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreted  # noqa: F401

import httpx
import numpy as np
import psutil
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


pytest_plugins = ["rollout_wal.testing.conformance"]


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


class Server:
    """`vllm serve` with the log inside, and its processes."""

    def __init__(
        self,
        launcher: subprocess.Popen[str],
        model: Path,
        log: Path,
        stderr: Path,
        *,
        one_process: bool = False,
        **options: Any,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = {"rollout_wal": {"log": str(log), **options.pop("config", {})}}
        arguments = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--block-size": 32,
            "--max-num-seqs": 8,
            "--scheduler-cls": "rollout_wal.engines.vllm.scheduler.LoggingScheduler",
            "--logits-processors": "rollout_wal.engines.vllm.processor:PositionNoise",
            "--additional-config": json.dumps(config),
            **options,
        }
        argv = ["--model", str(model), "--enforce-eager"]
        for name, value in arguments.items():
            argv += [name, str(value)]
        # In one process (per engine core) the sampler's log-probabilities are at hand, and a start is faster.
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not one_process))}
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        print(json.dumps({"argv": argv, "env": env, "log": str(stderr)}), file=launcher.stdin, flush=True)
        self.process = psutil.Process(int(launcher.stdout.readline()))
        self.pids: dict[str, int] = {}

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.process.is_running(), "the server ended while it started"
            assert time.monotonic() < deadline, "the server did not start in time"
            with contextlib.suppress(httpx.HTTPError), httpx.Client(verify=False, timeout=5) as client:
                if client.get(f"{self.url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        for child in self.process.children(recursive=True):
            title = child.cmdline()[:1] or [child.name()]
            for name in ("EngineCore", "Worker"):
                if name in title[0]:
                    self.pids[name] = child.pid
        self.pids["FrontEnd"] = self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self, what: str) -> None:
        """SIGKILL to "EngineCore", "Worker", "FrontEnd", or to "Tree": all of them. "Term": SIGTERM to all."""
        if what in ("Tree", "Term"):
            os.killpg(self.process.pid, signal.SIGKILL if what == "Tree" else signal.SIGTERM)
        else:
            os.kill(self.pids[what], signal.SIGKILL)

    def wait_dead(self, timeout_s: float = 90.0) -> None:
        """Until the front end is gone: vLLM ends it when its engine is dead."""
        self.process.wait(timeout_s)

    def close(self) -> None:
        """Whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Heard:
    """What a client has of one rollout."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    failed: bool = False


async def stream(url: str, body: dict[str, Any], heard: Heard) -> Heard:
    """One streamed completion; `heard` grows with each chunk."""
    try:
        timeout = httpx.Timeout(120.0)
        async with (
            httpx.AsyncClient(
                timeout=timeout, verify=False
            ) as client,  # plain HTTP, and certificates take long to load
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise AssertionError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    heard.failed = True
                    return heard
                for choice in chunk["choices"]:
                    heard.tokens += choice.get("token_ids") or []
                    heard.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
                    heard.finish = choice["finish_reason"] or heard.finish
    except httpx.HTTPError:
        heard.failed = True
    return heard


@pytest.fixture(scope="session")
def launcher() -> Iterator[subprocess.Popen[str]]:
    """See launcher.py."""
    path = Path(__file__).parent / "launcher.py"
    process = subprocess.Popen([sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            break
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture
def serve(model: Path, tmp_path: Path, launcher: subprocess.Popen[str]) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        chosen = options.pop("model", model)
        servers.append(Server(launcher, chosen, tmp_path / "wal", tmp_path / "server.log", **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
    print((tmp_path / "server.log").read_text()[-8000:])


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What test modules share: they cannot import one another."""
    return SimpleNamespace(
        request_of=request_of,
        drive=drive,
        wait_until=wait_until,
        stream=stream,
        Heard=Heard,
        OPTIONS=OPTIONS,
        FACTORY=FACTORY,
    )
