"""TRL's GRPOTrainer on vLLM: its worker is killed, then its process, and it ends where the uninterrupted run ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rollout_wal.dataset import open_dataset
from rollout_wal.testing.engine_suite import module_at


@pytest.fixture(scope="module")
def kills_of_trl() -> ModuleType:
    """The lives of a training process, and what is compared: those of the tests on the embedded engine."""
    path = Path(__file__).parents[1] / "tests" / "trainers" / "test_trl_kills.py"
    module: ModuleType = module_at(path, "trl_kills")
    return module


@pytest.mark.timeout(1200)
def test_killed_with_its_worker_it_ends_where_it_would_have(
    kills_of_trl: ModuleType, tools: SimpleNamespace, tmp_path: Path
) -> None:
    options = {
        "steps": 3,
        "model": {"mean_length": 12.0, "max_context": 512, "head_dim": 32},
        "engine": {"factory": tools.FACTORY, "options": {**tools.OPTIONS, "num_gpu_blocks_override": 120}},
        # Steps of plain size: Adam's first ones turn a rounding error of a gradient near zero into a whole step.
        "config": {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"},
    }
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert kills_of_trl.live(reference, **options) == 0
    assert kills_of_trl.live(killed, **options, worker_kills=1, die_at=("stepped", 4)) == -signal.SIGKILL
    assert kills_of_trl.live(killed, **options, worker_kills=1) == 0
    # vLLM batches requests as they come: the last bits of log-probabilities differ, and with them the correction.
    kills_of_trl.check(killed, reference, 1e-5)
    assert json.loads((killed / "done.json").read_text())["deaths"] > 0
    # Each step sampled with the weights that the step before had handed to vLLM.
    rows = open_dataset(killed / "archive").metadata().to_pylist()
    versions = {(json.loads(row["extras"])["optimizer_step"], *row["policy_versions"]) for row in rows}
    assert {step for step, *_ in versions} == {1, 2, 3}
    assert {version for _, version in versions} == {0, 1, 2}
    assert all(row["loss_tokens"] == row["response_length"] for row in rows)
