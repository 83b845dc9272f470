"""Rollouts on SGLang that survive the death of their workers: a backend whose workers run SGLang's scheduler.

    python examples/sglang_rollouts.py [MODEL]

Without a model folder it makes a tiny one. It kills a worker on the way, and shows that the rollouts are those of an
undisturbed run. On a GPU, pass server_args and dtype as you would to SGLang.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from rollout_wal.backend import EngineSpec, RolloutBackend
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model

PROMPTS = [[1, 40 + i, 50 + 2 * i, 60 + 3 * i] for i in range(8)]
SAMPLING = SamplingParams(max_tokens=200, temperature=0.9, top_p=0.95)


def run(model: Path, folder: Path, *, kill: bool) -> dict[str, list[int]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = EngineSpec(
        str(model),
        "rollout_wal.engines.sglang.engine:SglangEngine.from_folder",
        {"device": device, "max_batch": 32, "kv_tokens": 16384},
    )
    with RolloutBackend(spec, folder, workers=1) as backend:
        out: dict[str, list[int]] = {}
        for rollout in backend.generate(PROMPTS, SAMPLING, group_size=4, cohort="step-0"):
            if kill and not out:
                backend.kill_worker("0")  # as a preemption without notice would
            out[rollout.key] = rollout.tokens.tolist()
        print(f"{len(out)} rollouts, {backend.stats.deaths} deaths, {backend.stats.resumed} resumed")
        print(f"begun = delivered + in flight + censored: {backend.balance().holds}")
    return out


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else make_tiny_model(folder / "model", mean_length=80.0)
        undisturbed = run(model, folder / "wal-1", kill=False)
        killed = run(model, folder / "wal-2", kill=True)
        print(f"the same tokens: {undisturbed == killed}")


if __name__ == "__main__":
    main()
