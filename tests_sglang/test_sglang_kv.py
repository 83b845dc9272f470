"""KV snapshots of `RolloutBackend` with SGLang in its workers, on a CPU."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from rollout_wal.backend import EngineSpec, RolloutBackend
from rollout_wal.params import SamplingParams
from rollout_wal.prompts import rollout_seed

PROMPTS = [[1, 40 + i, 50 + 2 * i, 60 + 3 * i] for i in range(6)]


def test_a_worker_that_is_given_notice_hands_its_kv_over(model: Path, engine: Any, tools: Any, tmp_path: Path) -> None:
    sampling = SamplingParams(max_tokens=400, ignore_eos=True)
    requests = [tools.request_of(i, p, sampling, noise_key=rollout_seed(3, i)) for i, p in enumerate(PROMPTS)]
    expected = {i: [r[0] for r in rows] for i, rows in tools.drive(engine, requests).items()}
    options = {"max_batch": 8, "kv_tokens": 4096}
    spec = EngineSpec(str(model), "rollout_wal.engines.sglang.engine:SglangEngine.from_folder", options)
    with RolloutBackend(spec, tmp_path / "wal", workers=1, kv=tmp_path / "kv") as backend:
        iterator = backend.generate(PROMPTS, sampling, seed=3)
        tools.wait_until(lambda: backend.stats.tokens > 600)
        backend.kill_worker("0", signal.SIGTERM)
        rollouts = {r.index: r for r in iterator}
        stats = backend.stats
    assert {i: r.tokens.tolist() for i, r in rollouts.items()} == expected
    assert stats.resumed == 6
    assert stats.tokens_loaded > 0.9 * (stats.tokens_loaded + stats.tokens_prefilled)
