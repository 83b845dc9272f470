"""What TRL gets to see of a rollout: log-probabilities as they were logged, masks where nothing may be learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'trl'")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.backend.weights import same_weights
from rollout_wal.errors import BadInput
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ledger import STATE_FILE
from rollout_wal.trainers.trl import GRPOTrainer, last_checkpoint
from rollout_wal.trainers.trl.checkpoints import set_aside
from rollout_wal.trainers.trl.common import _forked_rng

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
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 16,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
        }
        args = GRPOConfig(**settings | (config or {}))
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
    begun = {"policy_version": now + 2}
    stale = replace(
        stale,
        output=replace(stale.output, version_T=old_T.astype(stale.output.version_T.dtype)),
        metadata=begun,
    )
    censored = replace(censored, censored="poison", output=censored.output[:0], metadata=begun)
    made = trainer(max_staleness=1)
    made.model.train()
    # After a restart the log is ahead of the batch: how old its tokens are does not depend on that.
    made._backend = _AtVersion(backend, now + 7)  # type: ignore[assignment]
    whole = replace(whole, output=replace(whole.output, version_T=whole.output.version_T + 2), metadata=begun)
    columns = made._columns([[1, 40, 50]] * 3, [whole, stale, censored])
    assert columns["completion_ids"][0] == whole.tokens.tolist()
    np.testing.assert_array_equal(np.float32(columns["logprobs"][0]), whole.output.sampling_logprob.value_T)
    assert columns["env_mask"][0] == [1] * len(whole.tokens)
    assert columns["env_mask"][1] == [0] * 3 + [1] * (len(stale.tokens) - 3)
    assert columns["policy_versions"][1][:4] == [now, now, now, now + 2]
    # An empty completion would raise IndexError in TRL: one padding token that nothing is learnt from.
    assert (columns["completion_ids"][2], columns["env_mask"][2], columns["logprobs"][2]) == ([0], [0], [None])
    assert columns["censored"] == [None, None, "poison"]


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
    for name in ("tools", "environment_factory"):
        with pytest.raises(BadInput, match=f"{name} and a rollout backend .* episodes call tools"):
            trainer(**{name: [print]})
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


def test_checkpoints_of_lineages(tmp_path: Path) -> None:
    for step, lineage in ((2, 0), (8, 0), (10, 0), (4, 1)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).write_text(f'{{"lineage": {lineage}}}')
    (tmp_path / "checkpoint-12").mkdir()  # cut short
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    for _ in range(2):
        set_aside(tmp_path, after=2, below=1)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert {p.name for p in tmp_path.glob("lineage-0/*")} == {"checkpoint-8", "checkpoint-10", "checkpoint-12"}


def test_a_checkpoint_that_is_written_over_is_not_whole_meanwhile(
    trainer: Callable[..., GRPOTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(run=tmp_path.name)
    made.state.global_step = 4
    (tmp_path / "out" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-4" / STATE_FILE).write_text("{}")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trl.GRPOTrainer._save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        made._save_checkpoint(made.model, None)
    assert last_checkpoint(tmp_path / "out") is None


def test_what_trl_masks_itself_is_left_out(trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> None:
    made = trainer({"mask_truncated_completions": True, "max_completion_length": 6}, run=tmp_path.name)
    made.model.train()
    made._ledger.restore(None)
    made._generate_and_score_completions([{"prompt": p} for p in ("one", "one", "two", "two")])
    ended = {r.id: bool(r.finish_reason.name == "EOS") for r in made._last}
    assert set(ended.values()) != {True}
    for rollout in made._last:
        expected = () if ended[rollout.id] else ((0, len(rollout.tokens)),)
        assert made._facts[rollout.id].left_out == expected


def test_randomness_that_decides_the_data_is_seeded_once_per_batch(
    trainer: Callable[..., GRPOTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer({"gradient_accumulation_steps": 2}, run=tmp_path.name)
    made.model.train()
    made._ledger.restore(None)
    seeds: list[int] = []
    seed = torch.manual_seed

    def noted(value: int) -> Any:
        seeds.append(value)
        return seed(value)

    monkeypatch.setattr(torch, "manual_seed", noted)
    rows = [{"prompt": p} for p in ("one", "one", "two", "two")] * 2
    for made._step in range(2):
        before = torch.get_rng_state()
        made._prepare_inputs(rows)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(seeds) == 1


def test_the_noise_of_an_accelerator_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding seeds all of them."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(device_count=lambda: 2))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, device_type="": asked.update({device_type: devices}))
    _forked_rng(torch.device("cuda"))
    assert {kind: list(devices) for kind, devices in asked.items()} == {"cuda": [0, 1]}


def test_same_weights(model: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    weights = dict(policy.state_dict())
    assert same_weights(weights, model)
    assert same_weights(weights | {"tied": next(iter(weights.values()))}, model)
    assert not same_weights(weights | {"another": torch.zeros(1)}, model)
    assert not same_weights({name: t.bfloat16() for name, t in weights.items()}, model)
    assert not same_weights(weights, model / "nowhere")
    with torch.no_grad():
        next(iter(weights.values()))[0] += 1e-6
    assert not same_weights(weights, model)


class _AtVersion:
    """The backend, later."""

    def __init__(self, backend: RolloutBackend, version: int) -> None:
        self._backend = backend
        self.policy_version = version

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
