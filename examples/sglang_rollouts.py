"""Rollouts on SGLang that survive the death of their workers: a backend whose workers run SGLang's scheduler.

    python examples/sglang_rollouts.py [MODEL]

Without a model folder it makes a tiny one. It kills a worker on the way (`_killed.py`), and shows that the rollouts are
those of an undisturbed run. On a GPU, pass server_args and dtype as you would to SGLang.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from _killed import compare

from rollout_wal.backend import EngineSpec
from rollout_wal.testing.tiny_models import make_tiny_model


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = sys.argv[1] if len(sys.argv) > 1 else make_tiny_model(folder / "model", mean_length=80.0)
        spec = EngineSpec(
            str(model),
            "rollout_wal.engines.sglang.engine:SglangEngine.from_folder",
            {"device": "cuda" if torch.cuda.is_available() else "cpu", "max_batch": 32, "kv_tokens": 16384},
        )
        compare(spec, folder)


if __name__ == "__main__":
    main()
