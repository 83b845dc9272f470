"""What TRL's trainer does with a log from an earlier life: forks, evaluations, a run that is over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'trl'")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from rollout_wal.backend import RolloutBackend
from rollout_wal.errors import CheckpointMismatch
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ledger import read_state
from rollout_wal.trainers.trl import GRPOTrainer, last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

Life = Callable[..., AbstractContextManager[GRPOTrainer]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=12.0)


@pytest.fixture
def life(model: Path, tmp_path: Path) -> Life:
    """A trainer in a process of its own, as it were: with a backend on the log that the one before has left."""

    @contextmanager
    def begin(config: dict[str, Any] | None = None, *, scale: float = 1.0, **options: Any) -> Iterator[GRPOTrainer]:
        """`config`: of TRL's; `scale`: of the model's head, so that it is another model."""
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        with torch.no_grad():
            policy.lm_head.weight.mul_(scale)
        rows = Dataset.from_dict({"prompt": ["one", "two", "three", "four"]})
        with RolloutBackend(model, tmp_path / "wal", slots=8, segment_bytes=1 << 18) as backend:
            yield GRPOTrainer(
                policy,
                lambda completions, **_: [float(len(c)) for c in completions],
                args=GRPOConfig(**settings | (config or {})),
                train_dataset=rows,
                eval_dataset=rows,
                processing_class=AutoTokenizer.from_pretrained(model),
                backend=backend,
                **options,
            )

    return begin


@pytest.mark.slow
def test_a_fork_and_the_checkpoints_that_it_leaves_behind(life: Life, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    with life({"max_steps": 4, "save_steps": 2}) as trainer:
        trainer.train()
    shutil.copytree(out / "checkpoint-2", kept)
    forked = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with life(forked, fork=True) as trainer:
        trainer._save_checkpoint = die
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=str(kept))
        first = [(r.id, r.cohort) for r in trainer._last]
    assert {cohort for _, cohort in first} == {"grpo.1/2"}
    assert (out / "lineage-0" / "checkpoint-4").is_dir()
    assert last_checkpoint(out) == str(out / "checkpoint-2")

    with life(forked, fork=True) as trainer:  # it had no checkpoint yet: the same fork goes on
        trainer.train(resume_from_checkpoint=str(kept))
        assert [(r.id, r.cohort) for r in trainer._last] == first
    # The only one, though an older lineage had a checkpoint of a later step.
    assert last_checkpoint(out) == str(out / "checkpoint-3")
    assert read_state(out / "checkpoint-3")["lineage"] == 1

    with life(forked, fork=True) as trainer, pytest.raises(CheckpointMismatch, match="run 'grpo' was forked"):
        trainer.train(resume_from_checkpoint=str(kept))
    with life(forked, fork="again") as trainer:
        trainer.train(resume_from_checkpoint=str(kept))
        assert {r.cohort for r in trainer._last} == {"grpo.2/2"}
    assert read_state(out / "checkpoint-3")["lineage"] == 2
    assert (out / "lineage-1" / "checkpoint-3").is_dir()


def test_an_evaluation_is_of_the_weights_that_are_there(life: Life) -> None:
    with life() as trainer:
        # One that a crash has ended: under a name that comes again, of rollouts that nobody will ask for.
        trainer._ledger.evaluate("0.1", [[1, 40]], SamplingParams(max_tokens=8))
    for scale in (1.0, 4.0):
        with life(scale=scale) as trainer:
            trainer.evaluate()
            [found] = [m for m in trainer.state.log_history if "eval_sampling/sampling_logp_difference/max" in m]
            assert found["eval_sampling/sampling_logp_difference/max"] < 1e-4
            assert trainer._backend.policy_version == (scale != 1.0)
            assert (
                trainer._backend.stats.deaths == 0
            )  # other weights than those in force are no reason to kill a worker
            assert all(c.gone == c.size for c in trainer._backend.cohorts().values())


def test_a_run_that_is_over_trains_no_more(life: Life, tmp_path: Path) -> None:
    """Two steps are an epoch: it ends within one."""
    settings = {"num_train_epochs": 1.5, "save_steps": 1, "save_total_limit": 1}
    with life(settings) as trainer:
        trainer.train()
        assert trainer.state.global_step == 3
        cohorts = trainer._backend.cohorts()
    with life(settings) as trainer:
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path / "out"))
        assert trainer.state.global_step == 3
        assert trainer._backend.cohorts() == cohorts
    with life(settings | {"num_train_epochs": 2}) as trainer:  # unless it is told to go on
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path / "out"))
        assert trainer.state.global_step == 4
