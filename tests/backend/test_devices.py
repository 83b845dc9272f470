"""Which accelerators a worker sees. None is needed for that: it is what a worker's environment says before its engine
is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout_wal.backend import EngineSpec, RolloutBackend
from rollout_wal.engines.hf import HFEngine
from rollout_wal.errors import BadInput
from rollout_wal.params import SamplingParams


class Seeing:
    """The embedded engine, that writes down what it could see when it was built."""

    @staticmethod
    def from_folder(model: str, *, seen: str, **options: Any) -> HFEngine:
        (Path(seen) / str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        return HFEngine.from_folder(model, **options)


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> EngineSpec:
    (tmp_path / "seen").mkdir()
    return EngineSpec(str(model), f"{__name__}:Seeing.from_folder", {"seen": str(tmp_path / "seen"), "max_batch": 16})


def seen(spec: EngineSpec, backend: RolloutBackend) -> dict[str, str]:
    """By worker."""
    return {name: (Path(spec.options["seen"]) / str(pid)).read_text() for name, pid in backend.worker_pids().items()}


def test_each_worker_sees_its_own_and_so_does_its_successor(
    backend: Callable[..., RolloutBackend], spec: EngineSpec, prompts: Any, until: Callable[..., None]
) -> None:
    expected = {"0": "4", "1": "5,6"}
    with backend(engine=spec, devices=["4", "5,6"]) as b:
        until(lambda: len(b.worker_steps()) == 2)
        assert seen(spec, b) == expected
        first = b.worker_pids()
        b.kill_worker("1")
        until(lambda: len(b.worker_steps()) == 2 and b.worker_pids()["1"] != first["1"])
        assert seen(spec, b) == expected
        assert len(list(b.generate(prompts, SamplingParams(max_tokens=5)))) == len(prompts)


def test_without_a_word_all_see_what_this_process_sees(
    backend: Callable[..., RolloutBackend], spec: EngineSpec, until: Callable[..., None], monkeypatch: Any
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with backend(engine=spec) as b:
        until(lambda: len(b.worker_steps()) == 2)
        assert set(seen(spec, b).values()) == {"7"}


@pytest.mark.parametrize("devices", [["0"], "01", []])
def test_one_entry_for_each_worker(backend: Callable[..., RolloutBackend], devices: Any) -> None:
    with pytest.raises(BadInput, match="for 2 workers"):
        backend(devices=devices)
