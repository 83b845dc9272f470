"""The whole of it in real processes: a student whose workers, trainer and scoring server are killed ends with the
weights of one that nobody touched, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rollout_wal.trainers.mopd.checkpoint import last_checkpoint
from rollout_wal.trainers.mopd.config import School, StudentConfig
from rollout_wal.trainers.mopd.report import mopd_page
from rollout_wal.trainers.mopd.results import summarise
from rollout_wal.trainers.mopd.run import make_models, run_student
from rollout_wal.trainers.mopd.school import NAMES, make

SCHOOL = School(addition_steps=2, sorting_steps=2, student_steps=2, batch=16)
#: One item to a forward: a teacher's scores then follow from the item alone, whatever else was asked for with it.
SMALL = StudentConfig(
    objective="full_vocabulary",
    batches=4,
    rollouts=24,
    token_budget=200,
    checkpoint_every=2,
    evaluate_every=4,
    held_out=8,
    workers=1,
    slots=12,
    hazard=0.03,
    trainer_kills=1,
    server_kills=1,
    teacher_token_budget=1,
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_unkilled_end_with_the_same_weights(tmp_path: Path) -> None:
    """Hidden states over gRPC, Arrow, loader and the fused loss: every float on the way must be the same again."""
    torch.set_num_threads(1)
    console, models = Console(quiet=True), tmp_path / "models"
    for name in NAMES:
        make(models, name, SCHOOL)
    specialists = make_models(models, SCHOOL, console)  # they are all there
    summaries, weights = {}, {}
    for arm in ("unkilled", "killed"):
        config = replace(SMALL, arm=arm)
        run = run_student(tmp_path, config, models, console)
        summaries[arm] = summarise(run, specialists)
        folder = last_checkpoint(tmp_path / f"{config.objective}-{arm}-0" / "checkpoints")
        assert folder is not None
        assert folder.name == "000004"
        weights[arm] = load_file(folder / "model.safetensors")
        page = mopd_page({"runs": {config.objective: summaries[arm]}}, {config.objective: run}).html()
        assert page.count("<svg") == (6 if summaries[arm]["interruptions"] else 5)
        assert "http://" not in page.replace("http://www.w3.org", "")
    killed, unkilled = summaries["killed"], summaries["unkilled"]
    assert unkilled["kills"] == {"trainer": 0, "server": 0, "workers": 0}
    assert killed["kills"]["trainer"] == 1
    assert killed["kills"]["server"] == 1
    assert killed["balance_holds"]
    assert unkilled["balance_holds"]
    assert killed["steps"] == unkilled["steps"] > 4
    assert killed["mean_length"] == unkilled["mean_length"]
    assert all(torch.equal(weights["killed"][name], value) for name, value in weights["unkilled"].items())
    start = load_file(models / "student" / "model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in weights["unkilled"].items())
