"""One SGLang engine for all tests of a process, a tiny model, and servers to be asked and killed.

Run with the interpreter of .venv-sglang (scripts/install_sglang.sh). SGLang keeps its configuration in globals, so
there is one embedded engine per process; servers and workers are processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("ROLLOUT_WAL_SGLANG_LOG", None)  # each server has its own

import psutil
import pytest

from rollout_wal.testing.engine_suite import drive, request_of, wait_until
from rollout_wal.testing.tiny_models import make_tiny_model

HERE = Path(__file__).parent
#: Small enough that long prompts are prefilled in chunks, requests wait, and the KV cache runs out.
OPTIONS: dict[str, Any] = {
    "max_batch": 8,
    "prefill_chunk": 64,
    "kv_tokens": 1536,
    "server_args": {"schedule_conservativeness": 0.05},
}


pytest_plugins = ["rollout_wal.testing.engine_suite"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=60.0)


@pytest.fixture(scope="session")
def engine(model: Path) -> Any:
    from rollout_wal.engines.sglang.engine import SglangEngine

    return SglangEngine.from_folder(model, **OPTIONS)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What test modules share: they cannot import one another."""
    return SimpleNamespace(request_of=request_of, drive=drive, wait_until=wait_until, OPTIONS=OPTIONS)


#: Imported once, by the process that servers are forked from.
PRELOADED = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)


@pytest.fixture(scope="session")
def nursery() -> Any:
    """Makes processes that have imported SGLang already: `nursery.Process(target=..., args=...)`."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Server:
    """`serve.py` in a process group of its own."""

    def __init__(
        self,
        nursery: Any,
        model: Path,
        log: Path | None,
        errors: Path,
        *,
        spawn: bool = False,
        variables: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        import serve

        self.log = log
        given = {
            "model_path": str(model),
            "dtype": "float32",
            "max_running_requests": 8,
            "max_total_tokens": 4096,
            "chunked_prefill_size": 64,
            "disable_overlap_schedule": True,
            **options,
        }
        variables = {**(variables or {}), **({"ROLLOUT_WAL_SGLANG_LOG": str(log)} if log is not None else {})}
        self._errors = errors
        theirs_in, self._orders = nursery.Pipe(duplex=False)
        self._events, theirs_out = nursery.Pipe(duplex=False)
        self.process = nursery.Process(target=serve.run, args=(theirs_in, theirs_out, given, variables, errors, spawn))
        self.process.start()
        theirs_in.close()
        theirs_out.close()
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.pids: dict[str, int] = {}

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.events.append(json.loads(self._events.recv_bytes()))

    def _over(self) -> bool:
        return self.process.exitcode is not None

    def wait_ready(self) -> Server:
        wait_until(lambda: bool(self.events) or self._over(), 280)
        assert self.events, self._errors.read_text()[-4000:]
        self.pids = self.events[0]["pids"]
        return self

    def order(self, **order: Any) -> None:
        self._orders.send_bytes(json.dumps(order).encode())

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
            lambda: bool(self.of("ended", name) or self.of("refused", name)) or self._over(),
            timeout_s,
        )
        assert not self._over(), self._errors.read_text()[-4000:]
        events = self.of("ended", name) or self.of("refused", name)
        return dict(events[-1].get("output") or {"error": events[-1]["error"]})

    def told(self, what: str, count: int = 1) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [e for e in self.events if e["event"] == "done" and e["do"] == what]

        wait_until(lambda: len(found()) >= count or self._over())
        assert not self._over(), self._errors.read_text()[-4000:]
        return found()[count - 1]

    def end(self) -> None:
        """Everything of it is gone when this returns."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self._reader.join(10.0)

        def alive(pid: int) -> bool:
            return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

        wait_until(lambda: not any(alive(pid) for pid in self.pids.values()), 30)


@pytest.fixture(scope="session")
def server_of(nursery: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """(log, **options) -> a server that is starting; all of them are ended with the session."""
    servers: list[Server] = []
    errors = tmp_path_factory.mktemp("servers") / "stderr"

    def make(log: Path | None, **options: Any) -> Server:
        servers.append(Server(nursery, options.pop("model", model), log, errors, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.end()
