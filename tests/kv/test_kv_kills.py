"""Workers are killed under a backend that keeps KV; a process is killed while it saves, loads, collects."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from rollout_wal.backend import EngineSpec, PoisonRule, RolloutBackend
from rollout_wal.engine_log import EngineLog
from rollout_wal.kv import Chain, KvConfig, KvLayout, KvStore, Run
from rollout_wal.kv.layout import Attention
from rollout_wal.params import SamplingParams
from rollout_wal.records import RecordType, Snapshot
from rollout_wal.wal import RolloutWal

PROMPTS = [[1, 40 + i, 50 + 2 * i, 60 + 3 * i] for i in range(4)]
SAMPLING = SamplingParams(max_tokens=250, ignore_eos=True)


def run(backend: RolloutBackend, kill: int | None, every_s: float = 0.4) -> dict[str, list[int]]:
    """The tokens by key, with workers signalled meanwhile."""
    over = threading.Event()
    rng = random.Random(1)

    def killer() -> None:
        while kill is not None and not over.wait(every_s):
            if ready := sorted(backend.worker_steps()):
                backend.kill_worker(rng.choice(ready), kill)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        rollouts = backend.generate(PROMPTS, SAMPLING, group_size=4, seed=1, cohort="job")
        return {r.key: r.tokens.tolist() for r in rollouts}
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What comes out when nothing goes wrong, without KV snapshots."""
    with RolloutBackend(model, tmp_path_factory.mktemp("plain") / "wal", slots=16) as backend:
        return run(backend, None)


def test_preempted_workers_load_and_do_not_compute(model: Path, tmp_path: Path, expected: dict[str, list[int]]) -> None:
    with RolloutBackend(model, tmp_path / "wal", workers=2, slots=16, kv="auto") as backend:
        assert run(backend, signal.SIGTERM) == expected
        stats = backend.stats
        assert stats.resumed > 0
        assert stats.snapshots > 0
        assert stats.tokens_loaded > 10 * stats.tokens_prefilled
        assert not stats.kv_fallbacks
        assert backend.balance().holds


def test_workers_killed_without_notice_find_background_snapshots(
    model: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    config = KvConfig(str(tmp_path / "kv"), codec="planes", every_tokens=16)
    with RolloutBackend(model, tmp_path / "wal", workers=2, slots=16, kv=config) as backend:
        assert run(backend, signal.SIGKILL, 0.6) == expected
        assert backend.stats.resumed > 0
        assert backend.stats.tokens_loaded > 0


def test_the_job_itself_is_stopped_and_goes_on(model: Path, tmp_path: Path, expected: dict[str, list[int]]) -> None:
    """And a Snapshot record stands in the engine's log for what was saved."""
    path = tmp_path / "wal"
    with RolloutBackend(model, path, slots=16, kv="auto") as backend:
        iterator = backend.generate(PROMPTS, SAMPLING, group_size=4, seed=1, cohort="job")
        while backend.stats.tokens < 16 * 60:
            time.sleep(0.01)
        del iterator
    with RolloutWal.open(path) as wal:
        log = wal.engine_path("0")
    with closing(EngineLog.open(log)) as engine_log:
        logged = [Snapshot.decode(f.payload) for f in engine_log.log.read() if f.type == RecordType.SNAPSHOT]
    assert len(logged) == 16
    with RolloutBackend(model, path, slots=16, kv="auto") as backend:
        assert run(backend, None) == expected
        assert backend.stats.tokens_loaded >= 16 * 59
        # The last token of each is computed for its logits, always.
        assert backend.stats.tokens_prefilled == 16


@pytest.mark.slow
def test_forty_lives(
    model: Path, tmp_path: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers die while they save, load and collect KV; see `kv_killing_engine`. The tokens are those of the run that
    nothing happened to, and no engine was ever given KV that it would not have computed."""
    lives, journal = 40, tmp_path / "journal"
    journal.mkdir()
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # workers look for the engine where this process does
    spec = EngineSpec(
        str(model),
        factory="kv_killing_engine:build",
        options={"journal": str(journal), "lives": lives, "seed": 5, "max_batch": 16},
    )
    config = KvConfig(str(tmp_path / "kv"), codec="raw", block_tokens=16, every_tokens=3)
    with RolloutBackend(spec, tmp_path / "wal", slots=16, kv=config, poison=PoisonRule(deaths=1000)) as backend:
        assert run(backend, None) == expected
        assert backend.balance().holds
        assert backend.stats.deaths >= lives
        assert backend.stats.tokens_loaded > 1000
    names = [path.name for path in journal.iterdir()]
    assert not [name for name in names if name.startswith("wrong")]
    killed = [name.split("-")[2:4] for name in names if name.startswith("killed")]
    assert len(killed) == lives
    for phase in ("save", "load", "collect"):
        assert sum(name == phase and where != "timer" for name, where in killed) >= lives // 8


CHILD = """
import sys
import numpy as np
from rollout_wal.kv import Chain, KvArrays, KvLayout, KvStore, Run
from rollout_wal.kv.layout import Attention

layout = KvLayout("bfloat16", (Attention(1, 32, 32),) * 2)
chain = Chain(layout, "architecture", 16)
with KvStore(sys.argv[1], codec="planes", file_bytes=1 << 20) as store:
    print("open", flush=True)
    for n in range(int(sys.argv[2]), 1 << 30):
        token_T = np.arange(n * 200, n * 200 + 200, dtype=np.int32)
        parts = tuple((token_T[None, :, None] * 7 + np.arange(32)).astype(np.uint16) for _ in layout.token_parts)
        store.save(str(n), KvArrays(token_T, parts), chain, [Run(200, 0, "weights")])
        store.commit()
        print("saved", n, flush=True)
        store.load(token_T, chain, [Run(200, 0, "weights")])
        if n % 3 == 0:
            store.gc(lambda manifest: int(manifest.name) % 4 == 0)
"""


@pytest.mark.parametrize("lives", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_it_saves_loads_and_collects(tmp_path: Path, lives: int) -> None:
    """Whatever is found after any kill is right, and what was committed and is needed is still there."""
    layout = KvLayout("bfloat16", (Attention(1, 32, 32),) * 2)
    chain, run_of = Chain(layout, "architecture", 16), [Run(200, 0, "weights")]
    rng = random.Random(lives)
    told: list[int] = []
    for life in range(lives):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "kv"), str(max(told, default=-1) + 1)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        told += [int(line.split()[1]) for line in child.stdout if line.startswith("saved") and line.endswith("\n")]
        child.wait()
        child.stdout.close()
        if life % 2:  # every other life begins without an index
            for file in (tmp_path / "kv" / "index").iterdir():
                file.unlink()
        with KvStore(tmp_path / "kv", codec="raw") as store:
            for n in range(max(told, default=-1) + 2):
                token_T = np.arange(n * 200, n * 200 + 200, dtype=np.int32)
                loaded = store.load(token_T, chain, run_of)
                assert loaded.reason in {"", "partial", "missing"}
                if n in told and n % 4 == 0:
                    assert loaded.tokens == 200
                if loaded.arrays is not None:
                    right = (token_T[None, : loaded.tokens, None] * 7 + np.arange(32)).astype(np.uint16)
                    assert all(np.array_equal(part, right) for part in loaded.arrays.parts)
    assert len(told) > lives
