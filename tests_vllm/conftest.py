"""One vLLM engine for all tests of a process, tiny models, and the plain sampler that all is compared with.

Run with the interpreter of .venv-vllm (scripts/install_vllm.sh). vLLM keeps its configuration in globals, so there is
one embedded engine per process; servers and workers are processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
import psutil
import pytest

from rollout_wal.testing import plain_sampler
from rollout_wal.testing.engine_suite import drive, request_of, wait_until
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


pytest_plugins = ["rollout_wal.testing.conformance", "rollout_wal.testing.engine_suite"]


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The independent sampler and the unbatched run: one oracle for all engines."""
    return plain_sampler


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=60.0, max_context=512, head_dim=32)


@pytest.fixture(scope="session")
def engine(model: Path) -> Iterator[Any]:
    from rollout_wal.engines.vllm.engine import VllmEngine

    engine = VllmEngine.from_folder(model, **OPTIONS)
    yield engine
    engine.close()


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
