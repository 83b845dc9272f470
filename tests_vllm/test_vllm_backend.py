"""RolloutBackend on vLLM, unchanged: kills of its workers, of itself, in good order, and new weights in flight."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rollout_wal.backend import EngineSpec, PoisonRule, RolloutBackend
from rollout_wal.params import SamplingParams
from rollout_wal.prompts import rollout_seed

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(4, 380, size=int(n)).tolist() for n in (5, 80, 33, 12)]
SAMPLING = SamplingParams(max_tokens=400, temperature=0.9, top_p=0.97, ignore_eos=True, frequency_penalty=0.05)
GROUP = 4


@pytest.fixture(scope="module")
def spec(model: Path, tools: SimpleNamespace) -> EngineSpec:
    options = {**tools.OPTIONS, "num_gpu_blocks_override": 120}
    return EngineSpec(str(model), factory=tools.FACTORY, options=options)


@pytest.fixture(scope="module")
def reference(engine: Any, tools: SimpleNamespace) -> list[list[int]]:
    """What each index says when nothing goes wrong: the engine driven directly."""
    requests = [
        tools.request_of(i, PROMPTS[i // GROUP], SAMPLING, noise_key=rollout_seed(1, i))
        for i in range(len(PROMPTS) * GROUP)
    ]
    rows = tools.drive(engine, requests)
    return [[r[0] for r in rows[i]] for i in range(len(rows))]


def outputs(backend: RolloutBackend, **options: Any) -> dict[int, Any]:
    rollouts = backend.generate(PROMPTS, SAMPLING, group_size=GROUP, seed=1, cohort="c", **options)
    return {r.id - 1: r for r in rollouts}


@pytest.mark.timeout(1800)
def test_random_kills_of_workers_change_nothing(
    spec: EngineSpec, reference: list[list[int]], tmp_path: Path, kills: int, tools: SimpleNamespace
) -> None:
    rng = random.Random(kills)
    done = threading.Event()
    total = SAMPLING.max_tokens * len(PROMPTS) * GROUP
    with RolloutBackend(spec, tmp_path / "wal", workers=1, slots=8, poison=PoisonRule(deaths=kills + 9)) as backend:
        coordinator = backend._coordinator
        assert coordinator is not None

        def killer() -> None:
            for _ in range(kills):
                worker = coordinator._workers[0]
                seen = backend.stats.tokens + rng.randrange(1, total // kills)
                while not (worker.running and backend.stats.tokens >= seen):
                    if done.wait(0.002):
                        return
                worker.signal(signal.SIGKILL)
                deaths = backend.stats.deaths
                while backend.stats.deaths == deaths:
                    if done.wait(0.002):
                        return

        thread = threading.Thread(target=killer, daemon=True)
        thread.start()
        got = outputs(backend)
        done.set()
        thread.join()
        assert backend.stats.deaths >= kills * 3 // 5
        assert backend.stats.resumed > 0
    assert [got[i].tokens.tolist() for i in range(len(reference))] == reference
    assert all(r.output.sampling_logprob.valid_T.all() for r in got.values())


_JOB = """
import sys
import numpy as np
sys.path.insert(0, {here!r})
from rollout_wal.backend import EngineSpec, RolloutBackend
from rollout_wal.params import SamplingParams

def main():
    spec = EngineSpec({model!r}, factory={factory!r}, options={options!r})
    with RolloutBackend(spec, {path!r}, workers=1, slots=8) as backend:
        print("ready", flush=True)
        sampling = SamplingParams.from_dict({sampling!r})
        for rollout in backend.generate({prompts!r}, sampling, group_size={group}, seed=1, cohort="c"):
            print("done", rollout.id, flush=True)

if __name__ == "__main__":
    main()
"""


def test_the_whole_tree_is_killed_and_the_same_rollouts_go_on(
    spec: EngineSpec, reference: list[list[int]], tmp_path: Path, tools: SimpleNamespace
) -> None:
    script = _JOB.format(
        here=str(Path(__file__).parents[1]),
        model=spec.model,
        factory=spec.factory,
        options=spec.options,
        path=str(tmp_path / "wal"),
        sampling=SAMPLING.to_dict(),
        prompts=PROMPTS,
        group=GROUP,
    )
    (tmp_path / "job.py").write_text(script)
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert job.stdout is not None
    lines = iter(job.stdout)
    shown = {int(line.split()[1]) - 1 for line in _until(lines, "done", 2)}
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    with RolloutBackend(spec, tmp_path / "wal", workers=1, slots=8) as backend:
        got = outputs(backend)
    assert shown <= set(got)
    assert [got[i].tokens.tolist() for i in range(len(reference))] == reference


def test_a_preempted_worker_saves_its_kv_and_the_next_one_loads_it(
    spec: EngineSpec, reference: list[list[int]], tmp_path: Path, tools: SimpleNamespace
) -> None:
    with RolloutBackend(spec, tmp_path / "wal", workers=1, slots=8, kv="auto") as backend:
        rollouts = iter(backend.generate(PROMPTS, SAMPLING, group_size=GROUP, seed=1, cohort="c"))
        tools.wait_until(lambda: backend.stats.tokens > 1500)
        worker = backend._coordinator._workers[0]  # type: ignore[union-attr]
        worker.signal(signal.SIGTERM)
        got = {r.id - 1: r for r in rollouts}
        stats = backend.stats
        assert stats.snapshots > 0
        assert stats.tokens_loaded > 500
        assert stats.tokens_prefilled < 32 * 16  # the rest of the last block of each
    assert [got[i].tokens.tolist() for i in range(len(reference))] == reference


def test_new_weights_in_flight_carry_their_version(
    spec: EngineSpec, successor: Path, reference: list[list[int]], tmp_path: Path, tools: SimpleNamespace
) -> None:
    with RolloutBackend(spec, tmp_path / "wal", workers=1, slots=8) as backend:
        rollouts = iter(backend.generate(PROMPTS, SAMPLING, group_size=GROUP, seed=1, cohort="c"))
        tools.wait_until(lambda: backend.stats.tokens > 500)
        backend.update_weights(successor, 7)
        got = {r.id - 1: r for r in rollouts}
    mixed = 0
    for index, rollout in got.items():
        versions = rollout.output.version_T.tolist()
        assert versions == sorted(versions)
        assert set(versions) <= {0, 7}
        old = versions.count(0)
        # Everything before the update is the old model's; what follows is not.
        assert rollout.tokens.tolist()[:old] == reference[index][:old]
        mixed += 0 < old < len(versions)
        assert old == len(versions) or rollout.tokens.tolist() != reference[index]
    assert mixed > 0


def _until(lines: Iterator[str], word: str, count: int) -> list[str]:
    found: list[str] = []
    deadline = time.monotonic() + 120
    for line in lines:
        if line.startswith(word):
            found.append(line)
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline
    raise AssertionError("the job ended early")
