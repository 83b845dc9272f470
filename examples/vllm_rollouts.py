"""Rollouts on vLLM that survive the death of their workers: a backend whose workers run vLLM's engine core.

    python examples/vllm_rollouts.py [MODEL]

Without a model folder it makes a tiny one. It kills a worker on the way (`_killed.py`), and shows that the rollouts are
those of an undisturbed run. Further options of the spec are those of vLLM's EngineArgs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from _killed import compare

from rollout_wal.backend import EngineSpec
from rollout_wal.testing.tiny_models import make_tiny_model


def _tiny(folder: Path) -> Path:
    return make_tiny_model(folder / "model", mean_length=80.0, head_dim=32)  # vLLM on a CPU takes no smaller heads


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else _tiny(folder)
        # float32: the tokens are the same to the last bit, whatever else is in the batch.
        options: dict[str, object] = {"max_batch": 32, "max_model_len": 512, "dtype": "float32"}
        if not torch.cuda.is_available():
            options["kv_cache_memory_bytes"] = 1 << 28
        compare(EngineSpec(str(model), "rollout_wal.engines.vllm.engine:VllmEngine.from_folder", options), folder)


if __name__ == "__main__":
    main()
