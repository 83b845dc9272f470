"""Rollouts on vLLM that survive the death of their workers: a backend whose workers run vLLM's engine core.

    python examples/vllm_rollouts.py [MODEL]

Without a model folder it makes a tiny one. It kills a worker on the way, and shows that the rollouts are those of an
undisturbed run. Further options of the spec are those of vLLM's EngineArgs.
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


def _tiny(folder: Path) -> Path:
    return make_tiny_model(folder / "model", mean_length=80.0, head_dim=32)  # vLLM on a CPU takes no smaller heads


def run(model: Path, folder: Path, *, kill: bool) -> dict[str, list[int]]:
    # float32: the tokens are the same to the last bit, whatever else is in the batch.
    options: dict[str, object] = {"max_batch": 32, "max_model_len": 512, "dtype": "float32"}
    if not torch.cuda.is_available():
        options["kv_cache_memory_bytes"] = 1 << 28
    spec = EngineSpec(
        str(model),
        "rollout_wal.engines.vllm.engine:VllmEngine.from_folder",
        options,
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
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else _tiny(folder)
        undisturbed = run(model, folder / "wal-1", kill=False)
        killed = run(model, folder / "wal-2", kill=True)
        print(f"the same tokens: {undisturbed == killed}")


if __name__ == "__main__":
    main()
