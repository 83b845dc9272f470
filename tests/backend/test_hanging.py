"""Workers that neither go on nor end, and rollouts that are nobody's yet: nobody waits for ever, nobody goes ahead."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout_wal.backend import EngineSpec, RolloutBackend
from rollout_wal.episode import Episodes
from rollout_wal.errors import BackendError
from rollout_wal.params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from episode_tools import SAMPLING as TURNS
from episode_tools import Memory, Parser

SAMPLING = SamplingParams(max_tokens=150)

ENGINE = '''
import os, time
from pathlib import Path
from rollout_wal.engines.hf import HFEngine

class Stuck(HFEngine):
    """Hangs while it closes, once; or breaks while it loads weights, and would go on sampling."""

    @classmethod
    def build(cls, folder, *, marks, policy_version=0, max_batch=16):
        engine = cls.from_folder(folder, max_batch=max_batch, policy_version=policy_version)
        engine.marks = Path(marks)
        engine.broken = False
        return engine

    def close(self):
        if (self.marks / "hang").exists():
            (self.marks / "hang").unlink()
            (self.marks / "hangs").touch()
            time.sleep(600)
        super().close()

    def load_weights(self, source, version):
        self.broken = True
        raise RuntimeError("half of them were read")

    def step(self):
        if self.broken:
            (self.marks / "sampled").touch()
        return super().step()
'''


@pytest.fixture
def stuck(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    (tmp_path / "stuck_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return EngineSpec(str(model), "stuck_engine:Stuck.build", {"marks": str(tmp_path)})


def test_a_worker_that_hangs_while_it_stops_is_ended(
    backend: Callable[..., RolloutBackend],
    stuck: EngineSpec,
    prompts: Any,
    reference: Any,
    until: Callable[..., None],
    tmp_path: Path,
) -> None:
    prompts = prompts[:4]
    long = SamplingParams(max_tokens=300, ignore_eos=True)
    with backend(engine=stuck, workers=1, grace_s=1.0) as b:
        iterator = b.generate(prompts, long, cohort="long")
        until(lambda: b.stats.tokens > 100)
        (tmp_path / "hang").touch()
        b.kill_worker("0", 15)  # notice of a preemption
        rollouts = list(iterator)
        assert (tmp_path / "hangs").exists()
        assert b.stats.deaths == 1
    assert {r.index: r.tokens.tolist() for r in rollouts} == dict(enumerate(reference(prompts, long, cohort="long")))


def test_half_loaded_weights_sample_nothing(
    backend: Callable[..., RolloutBackend], stuck: EngineSpec, prompts: Any, until: Callable[..., None], tmp_path: Path
) -> None:
    with backend(engine=stuck, workers=1) as b:
        iterator = b.generate(prompts, SamplingParams(max_tokens=300, ignore_eos=True))
        until(lambda: b.stats.tokens > 100)
        with pytest.raises(BackendError, match="half of them were read"):
            b.update_weights(tmp_path, 1)
        assert len(list(iterator)) == 8
    assert not (tmp_path / "sampled").exists()


def test_an_iterator_that_comes_while_tools_let_go_waits_for_them(
    backend: Callable[..., RolloutBackend], prompts: Any, until: Callable[..., None]
) -> None:
    enough = threading.Event()
    begun: list[str] = []

    class Slow(Memory):
        async def release(self, rollout_id: str) -> None:
            begun.append(rollout_id)
            while not enough.is_set():
                await asyncio.sleep(0.01)
            await super().release(rollout_id)

    tools = Slow()
    with backend(workers=1, episodes=Episodes(tools, Parser(), turns_max=1)) as b:
        first = b.generate(prompts[:4], TURNS, cohort="c")
        until(lambda: len(begun) > 0 and not b.in_flight("c"))
        del first
        later = b.generate(prompts[:4], TURNS, cohort="c")
        threading.Timer(0.5, enough.set).start()
        for r in later:
            assert not r.turns or r.episode in tools.released


def test_a_nursery_that_cannot_be_begun_leaves_nothing_behind(
    backend: Callable[..., RolloutBackend], prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what earlier tests have left is not this one's
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with monkeypatch.context() as m:
        m.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(FileNotFoundError):
            backend(episodes=Episodes(Memory(), Parser())).start()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert not [t for t in threading.enumerate() if t.name.startswith("rollout-wal") and t not in threads]
    with backend() as b:  # and the log was let go of
        assert len(list(b.generate(prompts, SAMPLING))) == 8
