"""Two ranks of the real TRL trainer (torchrun, gloo), each with a log of its own; one dies, and they go on together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("trl", reason="needs the extra 'trl'")

from rollout_wal.dataset import open_dataset

#: Groups of four, of which each rank has two members. Plain steps: Adam's first ones turn a rounding error of a
#: gradient near zero into a whole step.
OPTIONS = {
    "steps": 3,
    "config": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
    },
}


def live(folder: Path, **options: Any) -> int:
    """One life of both ranks; torchrun's exit status."""
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("trl_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run(
            [*command, str(script), str(folder), json.dumps(OPTIONS | options)],
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=False,
        )
    return done.returncode


def uses(folder: Path, rank: int) -> list[tuple[str, float | None, int]]:
    """Which step used which rollout of this rank, and its reward."""
    rows = open_dataset(folder / "archive" / f"rank-{rank}").metadata().to_pylist()
    return sorted((r["sample"], r["reward"], json.loads(r["extras"])["optimizer_step"]) for r in rows)


def tokens(folder: Path, rank: int) -> dict[str, list[int]]:
    """Prompts and completions by key."""
    dataset = open_dataset(folder / "archive" / f"rank-{rank}")
    found = {str(row["sample"]): dataset.payload(str(row["sample"])) for row in dataset.metadata().to_pylist()}
    return {key: payload.array("token_ids").tolist() for key, payload in found.items() if payload is not None}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_one_of_which_dies(tmp_path: Path) -> None:
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert live(reference) == 0, (reference / "output.txt").read_text()[-4000:]
    # Between the checkpoint and the log: the other rank has consumed, or will; this one has not.
    assert live(killed, die_at=["before commit", 1], die_rank=1, worker_kills=1) != 0
    assert live(killed) == 0, (killed / "output.txt").read_text()[-4000:]
    expected, found = (load_file(folder / "final" / "model.safetensors") for folder in (reference, killed))
    for name, tensor in expected.items():
        # DDP sums its first gradients after a start in other buckets than the later ones.
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-6, err_msg=name)
    for rank in (0, 1):
        got = uses(killed, rank)
        assert got == uses(reference, rank)
        assert max(Counter(key for key, *_ in got).values()) == 1
    # The ranks have two members each of the same groups, with noise of their own.
    first, second = tokens(killed, 0), tokens(killed, 1)
    assert first.keys() == second.keys()
    assert sum(first[key][:3] == second[key][:3] for key in first) == len(first)  # prompts
    assert sum(first[key] != second[key] for key in first) > len(first) // 2
