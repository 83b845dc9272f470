"""A tiny model, and what it says when nothing goes wrong: an engine driven directly, without a log or a backend."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout_wal.backend import RolloutBackend
from rollout_wal.engines.base import Request
from rollout_wal.engines.hf import HFEngine
from rollout_wal.params import SamplingParams
from rollout_wal.prompts import cohort_seed, rollout_seed
from rollout_wal.testing.tiny_models import make_tiny_model

PROMPTS = [[1, 40 + i, 50 + 2 * i, 60 + 3 * i] for i in range(8)]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=60.0)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return PROMPTS


Reference = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    """(prompts, sampling, group_size, seed or cohort) -> the output tokens of each index, of an uninterrupted run."""
    engine = HFEngine.from_folder(model, max_batch=64)

    def run(
        prompts: Sequence[Any],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int | None = None,
        cohort: str = "",
    ) -> list[list[int]]:
        assert (seed is None) == bool(cohort), "without a seed, the cohort's name decides"
        seed = cohort_seed(cohort) if seed is None else seed
        out: list[list[int]] = [[] for _ in range(len(prompts) * group_size)]
        for index in range(len(out)):
            prompt = np.asarray(prompts[index // group_size], np.int32)
            nothing = np.zeros(0, np.int32)
            key = rollout_seed(seed, index)
            engine.add(Request(index, prompt, nothing, nothing.astype(bool), sampling, key))
        while engine.unfinished:
            step = engine.step()
            for slot, token in zip(step.slot_N.tolist(), step.token_N.tolist(), strict=True):
                out[slot].append(token)
        return out

    return run


@pytest.fixture
def backend(model: Path, tmp_path: Path) -> Callable[..., RolloutBackend]:
    """(**options) -> a backend on this test's directory, not started."""

    def make(path: Path | None = None, *, engine: Any = None, **options: Any) -> RolloutBackend:
        given: dict[str, Any] = {"workers": 2, "slots": 16, "segment_bytes": 1 << 18, **options}
        return RolloutBackend(engine or model, path or tmp_path / "wal", **given)

    return make


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutBackend]:
    """One backend for the tests of a module that do it no harm."""
    with RolloutBackend(
        model, tmp_path_factory.mktemp("shared") / "wal", workers=2, slots=16, segment_bytes=1 << 18
    ) as shared:
        yield shared


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """(condition, timeout_s) -> waits for it, and fails if it does not come."""
    return wait_until


class WitnessProcess(AbstractContextManager["WitnessProcess"]):
    """A witness in a process of its own, which no kill reaches."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "witness.sock"
        self._dump = folder / "shown.npz"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rollout_wal.testing.witness", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def shown(self) -> dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]]:
        """(rollout, attempt) -> [(start, tokens, logprobs)]"""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self._dump}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "written\n"
        out: dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]] = {}
        with np.load(self._dump, allow_pickle=False) as file:
            stream, token, logprob = file["stream"], file["token"], file["logprob"]  # each look-up reads the file again
        at = 0
        for rollout, attempt, start, length in stream.tolist():
            part = slice(at, at + length)
            out.setdefault((rollout, attempt), []).append((start, token[part], logprob[part]))
            at += length
        return out

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(10.0) == 0


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[WitnessProcess]:
    with WitnessProcess(tmp_path) as process:
        yield process


class Job:
    """A backend in a process of its own (`job_script.py`), to be killed."""

    script = Path(__file__).with_name("job_script.py")

    def __init__(self, **config: Any) -> None:
        self.out = Path(config["out"])
        self.process = subprocess.Popen([sys.executable, str(self.script), json.dumps(config, default=str)])

    def lines(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        text = self.out.read_text() if self.out.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == name]


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """(**config) -> a Job on this test's directory."""
    jobs: list[Job] = []

    def start(**config: Any) -> Job:
        given = {"model": model, "path": tmp_path / "wal", "out": tmp_path / "out.jsonl", "prompts": PROMPTS, **config}
        jobs.append(Job(**given))
        return jobs[-1]

    yield start
    for each in jobs:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
