"""What TRL gets to see of a rollout: log-probabilities as they were logged, masks where nothing may be learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'trl'")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.errors import BadInput
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.trl import GRPOTrainer, last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=20.0)


@pytest.fixture(scope="module")
def backend(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutBackend]:
    with RolloutBackend(model, tmp_path_factory.mktemp("wal"), slots=8) as running:
        yield running


@pytest.fixture
def trainer(model: Path, backend: RolloutBackend, tmp_path: Path) -> Callable[..., GRPOTrainer]:
    def make(config: dict[str, Any] | None = None, **options: Any) -> GRPOTrainer:
        args = GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=16,
            report_to=[],
            use_cpu=True,
            bf16=False,
            **(config or {}),
        )
        return GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            lambda completions, **_: [float(len(c)) for c in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["one", "two"]}),
            processing_class=AutoTokenizer.from_pretrained(model),
            backend=backend,
            **options,
        )

    return make


@pytest.fixture(scope="module")
def rollouts(backend: RolloutBackend) -> list[FinishedRollout]:
    found = backend.generate([[1, 40, 50]], SamplingParams(max_tokens=16, min_tokens=8), group_size=3, seed=3)
    return sorted(found, key=lambda r: r.index)


def test_masks_and_logprobs(
    trainer: Callable[..., GRPOTrainer], rollouts: list[FinishedRollout], backend: RolloutBackend
) -> None:
    whole, stale, censored = rollouts
    now = backend.policy_version
    old_T = np.where(np.arange(len(stale.output)) < 3, now, now + 2)  # its first three tokens are two versions old
    stale = replace(stale, output=replace(stale.output, version_T=old_T.astype(stale.output.version_T.dtype)))
    censored = replace(censored, censored="poison", output=censored.output[:0])
    made = trainer(max_staleness=1)
    made.model.train()
    made._backend = _AtVersion(backend, now + 2)  # type: ignore[assignment]
    whole = replace(whole, output=replace(whole.output, version_T=whole.output.version_T + 2))
    columns = made._columns([[1, 40, 50]] * 3, [whole, stale, censored])
    assert columns["completion_ids"][0] == whole.tokens.tolist()
    np.testing.assert_array_equal(np.float32(columns["logprobs"][0]), whole.output.sampling_logprob.value_T)
    assert columns["env_mask"][0] == [1] * len(whole.tokens)
    assert columns["env_mask"][1] == [0] * 3 + [1] * (len(stale.tokens) - 3)
    assert columns["policy_versions"][1][:4] == [now, now, now, now + 2]
    # An empty completion would raise IndexError in TRL: one padding token that nothing is learnt from.
    assert (columns["completion_ids"][2], columns["env_mask"][2], columns["logprobs"][2]) == ([0], [0], [None])
    assert columns["censored"] == [None, None, "poison"]
    assert made._facts[stale.id].left_out == ((0, 3),)
    assert made._facts[whole.id].to_dict() == {"verifier": made.reward_func_names[0]}


def test_a_censored_rollout_has_no_reward(trainer: Callable[..., GRPOTrainer]) -> None:
    made = trainer()
    made.model.train()
    rows = [
        {"prompt": "one", "censored": None, "rollout_id": 7},
        {"prompt": "one", "censored": "deadline", "rollout_id": 8},
    ]
    rewards = made._calculate_rewards(rows, ["one", "one"], ["ab", "abc"], [[5, 6], [5, 6, 7]])
    assert rewards[0].tolist() == [2.0]
    assert torch.isnan(rewards[1]).all()
    assert made._rewards[7] == 2.0
    assert np.isnan(made._rewards[8])


def test_what_cannot_be_honoured(trainer: Callable[..., GRPOTrainer]) -> None:
    with pytest.raises(BadInput, match="rollout_func and a rollout backend"):
        trainer(rollout_func=print)
    with pytest.raises(BadInput, match="use_vllm=True and a rollout backend"):
        trainer({"use_vllm": True})
    with pytest.raises(BadInput, match="generation_kwargs="):
        trainer({"generation_kwargs": {"num_beams": 2}})
    with pytest.raises(BadInput, match="no whole checkpoint"):
        trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_a_crash_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-9" / "rollout_wal.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "rollout_wal.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


class _AtVersion:
    """The backend, later."""

    def __init__(self, backend: RolloutBackend, version: int) -> None:
        self._backend = backend
        self.policy_version = version

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
