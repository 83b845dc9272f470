"""`RolloutBackend`, unchanged, with SGLang in its workers: kills and new weights leave no trace in the tokens."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rollout_wal.backend import EngineSpec, PoisonRule, RolloutBackend
from rollout_wal.params import SamplingParams
from rollout_wal.prompts import rollout_seed

PROMPTS = [[1, 40 + i, 50 + 2 * i, 60 + 3 * i] for i in range(8)]
LONG = 400
FACTORY = "rollout_wal.engines.sglang.engine:SglangEngine.from_folder"


@pytest.fixture(scope="module")
def backend(model: Path, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutBackend]:
    spec = EngineSpec(str(model), FACTORY, tools.OPTIONS)
    with RolloutBackend(
        spec, tmp_path_factory.mktemp("backend") / "wal", workers=2, slots=16, poison=PoisonRule(deaths=1000)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def reference(engine: Any, tools: Any) -> Callable[..., dict[int, list[int]]]:
    def run(sampling: SamplingParams, group_size: int, seed: int) -> dict[int, list[int]]:
        requests = [
            tools.request_of(i, PROMPTS[i // group_size], sampling, noise_key=rollout_seed(seed, i))
            for i in range(len(PROMPTS) * group_size)
        ]
        return {i: [r[0] for r in rows] for i, rows in tools.drive(engine, requests).items()}

    return run


def test_random_kills_leave_no_trace_in_the_tokens(
    backend: RolloutBackend, reference: Any, tools: Any, kills: int
) -> None:
    rng = random.Random(8)
    killed = seed = 0
    sampling = SamplingParams(max_tokens=250, frequency_penalty=0.1)
    while killed < kills:
        seed += 1
        expected = reference(sampling, 4, seed)
        iterator = backend.generate(PROMPTS, sampling, group_size=4, seed=seed)
        got: dict[int, Any] = {}
        while len(got) < 32 and killed < kills:
            before = backend.stats.tokens
            tools.wait_until(
                lambda before=before: (
                    backend.stats.tokens > before + rng.randrange(10, 400) or not backend.balance().in_flight
                )
            )
            ready = sorted(backend.worker_steps())
            if not backend.balance().in_flight:
                break
            if ready:
                deaths = backend.stats.deaths
                backend.kill_worker(rng.choice(ready), rng.choice([signal.SIGKILL, signal.SIGTERM]))
                killed += 1
                tools.wait_until(lambda deaths=deaths: backend.stats.deaths > deaths)
        got.update({r.index: r for r in iterator})
        assert {i: r.tokens.tolist() for i, r in got.items()} == expected
        assert all(r.censored is None and r.output.logprob.valid_T.all() for r in got.values())
    assert backend.stats.deaths >= killed
    assert backend.stats.resumed > 0
    assert backend.balance().holds


def test_new_weights_reach_all_workers(
    backend: RolloutBackend, successor: Path, engine: Any, model: Path, tools: Any
) -> None:
    sampling = SamplingParams(max_tokens=LONG, ignore_eos=True)
    iterator = backend.generate(PROMPTS, sampling, group_size=2, seed=99)
    before = backend.stats.tokens
    tools.wait_until(lambda: backend.stats.tokens > before + 50)
    backend.update_weights(successor, 1)
    backend.kill_worker(sorted(backend.worker_steps())[0])  # its successor starts from the new weights
    rollouts = list(iterator)
    assert len(rollouts) == 16
    assert backend.policy_version == 1
    mixed = 0
    engine.load_weights(successor, engine.policy_version + 1)
    try:
        for r in rollouts:
            old = int(np.count_nonzero(r.output.version_T == 0))
            assert (np.diff(r.output.version_T) >= 0).all()
            assert len(r.tokens) == LONG
            mixed += 0 < old < LONG
            # What follows the change is what the new weights say after the old ones' tokens.
            request = tools.request_of(
                0, PROMPTS[r.index // 2], sampling, prefix=r.tokens[:old].tolist(), noise_key=rollout_seed(99, r.index)
            )
            if old < LONG:
                (rows,) = tools.drive(engine, [request]).values()
                assert [row[0] for row in rows] == r.tokens[old:].tolist()
    finally:
        engine.load_weights(model, engine.policy_version + 1)
    assert mixed


def test_workers_are_not_reached_from_outside(backend: RolloutBackend, tools: Any) -> None:
    """They meet nobody at a port that was chosen before; gloo's own are the kernel's choice, on the loopback device."""
    tools.wait_until(lambda: len(backend.worker_steps()) == 2)
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for pid in backend.worker_pids().values():
        listening = [c.laddr for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert all(at.ip.startswith("127.") and low <= at.port <= high for at in listening), listening
