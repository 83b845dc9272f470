"""slime's rollout and generate functions on a real backend.

slime itself needs Megatron, SGLang and GPUs and is not here. `Sample` and `Source` have the names, defaults and meaning
of slime's own `Sample` and `RolloutDataSource`, as far as the adapter and slime's conversion to training data use them.
"""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rollout_wal.backend import RolloutBackend
from rollout_wal.errors import BadInput, BadSampling, CheckpointMismatch, CohortMismatch
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers import slime

TEXTS = ["1+2=", "3+4=", "5+6=", "7+8=", "9+1=", "2+2="]


@dataclass
class Sample:
    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None
    prompt: Any = ""
    tokens: list[int] = field(default_factory=list)
    multimodal_inputs: dict[str, Any] | None = None
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: Any = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)


class Source:
    """Goes on counting; after a restart it is set back to where the checkpoint was."""

    def __init__(self, args: Namespace, offset: int = 0) -> None:
        self.args, self.offset = args, offset
        self.sample_index = offset * args.n_samples_per_prompt

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        groups = []
        for number in range(self.offset, self.offset + num_samples):
            prompt = Sample(prompt=TEXTS[number % len(TEXTS)], label=str(number))
            group = []
            for _ in range(self.args.n_samples_per_prompt):
                sample = copy.deepcopy(prompt)
                sample.group_index, sample.index = number, self.sample_index
                self.sample_index += 1
                group.append(sample)
            groups.append(group)
        self.offset += num_samples
        return groups


def drop_the_last(args: Namespace, groups: list[list[Sample]]) -> None:
    """For `--rollout-sample-filter-path`."""
    groups[-1][-1].remove_sample = True


def keep_the_count(args: Namespace, groups: list[list[Sample]], source: Source) -> None:
    """For `--rollout-all-samples-process-path`."""
    args.seen = (sum(len(group) for group in groups), source.offset)


async def count_ones(args: Namespace, sample: Sample) -> float:
    return float(sample.response.count("1"))


@pytest.fixture
def args() -> Namespace:
    return Namespace(
        rollout_batch_size=2,
        n_samples_per_prompt=2,
        rollout_temperature=1.0,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        rollout_max_response_len=24,
        rollout_stop=None,
        rollout_stop_token_ids=None,
        rollout_seed=7,
        custom_rm_path=f"{__name__}.count_ones",
        group_rm=False,
        reward_key=None,
        dynamic_sampling_filter_path=None,
        partial_rollout=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=12.0)


@pytest.fixture
def backend(model: Path, tmp_path: Path) -> Iterator[RolloutBackend]:
    with RolloutBackend(model, tmp_path / "wal", slots=8, segment_bytes=1 << 18) as running:
        yield running


def filled(groups: list[list[Sample]]) -> list[tuple[int | None, list[int], float]]:
    return [(s.index, s.tokens, s.reward) for group in groups for s in group]


def test_a_batch_is_one_cohort_and_comes_again_until_a_checkpoint_contains_it(
    args: Namespace, backend: RolloutBackend, model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ledger = slime.use_backend(backend, tokenizer, archive=tmp_path / "archive")
    ledger.restore(None)
    source = Source(args)
    first = slime.generate_rollout(args, 0, source)
    assert [[s.index for s in group] for group in first] == [[0, 1], [2, 3]]
    for sample in (s for group in first for s in group):
        prompt = tokenizer.encode(sample.prompt, add_special_tokens=False)
        assert sample.tokens[: len(prompt)] == prompt
        assert sample.response_length == len(sample.tokens) - len(prompt) == len(sample.loss_mask or [])
        assert sample.loss_mask == [1] * sample.response_length
        assert sample.rollout_log_probs is not None
        assert all(p < 0.0 for p in sample.rollout_log_probs)
        assert sample.weight_versions == ["0"]
        assert sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)
        assert (sample.status is Sample.Status.TRUNCATED) == (
            sample.response_length == 24 and sample.tokens[-1] != tokenizer.eos_token_id
        )
        assert sample.response == tokenizer.decode(sample.tokens[len(prompt) :])
        assert sample.reward == sample.response.count("1")
    # Started again without a checkpoint: the source is back at the beginning, and the rollouts are there.
    ledger = slime.use_backend(backend, tokenizer, archive=tmp_path / "archive")
    ledger.restore(None)
    source = Source(args)
    assert filled(slime.generate_rollout(args, 0, source)) == filled(first)
    state = slime.ledger_state(0)
    ledger.commit(state)
    assert backend.balance().released == 4
    second = slime.generate_rollout(args, 1, source)
    assert {s.index for group in second for s in group} == {4, 5, 6, 7}
    with pytest.raises(CohortMismatch):  # a source that was not set back
        slime.generate_rollout(args, 1, Source(args, offset=3))
    with pytest.raises(CheckpointMismatch):
        slime.generate_rollout(args, 0, Source(args))


def test_weights_that_change_in_the_middle_of_a_rollout_show(
    args: Namespace, backend: RolloutBackend, model: Path
) -> None:
    """One version for each run of tokens, and per token in the metadata."""
    from safetensors.torch import load_file

    args.rollout_max_response_len = 400
    slime.use_backend(backend, AutoTokenizer.from_pretrained(model))
    sampling = {"temperature": 1.0, "max_new_tokens": 400, "min_new_tokens": 380, "stop": None, "no_stop_trim": True}
    weights = load_file(str(model / "model.safetensors"))
    name = next(n for n in weights if n.endswith("layers.0.mlp.down_proj.weight"))

    async def both() -> Any:
        task = asyncio.create_task(slime.generate(args, Source(args).get_samples(1)[0][0], sampling))
        while not backend.stats.tokens:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(backend.update_weights, {**weights, name: weights[name] * 1.01}, 1)
        return await task

    sample = asyncio.run(both())
    versions = sample.metadata[slime.METADATA]["policy_versions"]
    assert sample.weight_versions == ["0", "1"]
    assert versions == sorted(versions)
    assert len(versions) == sample.response_length >= 380


def test_a_censored_rollout_is_aborted_and_under_no_loss(
    args: Namespace, backend: RolloutBackend, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args.rollout_max_response_len = 200
    slime.use_backend(backend, AutoTokenizer.from_pretrained(model))
    generate = backend.generate

    def and_abort_one(*a: Any, **k: Any) -> Any:
        items = generate(*a, **k)
        backend.abort(backend.members(k["cohort"])[1])
        return items

    monkeypatch.setattr(backend, "generate", and_abort_one)
    groups = slime.generate_rollout(args, 0, Source(args))
    cut, kept = groups[0][1], groups[0][0]
    assert cut.status is Sample.Status.ABORTED
    assert cut.remove_sample
    assert not kept.remove_sample
    assert cut.loss_mask == [0] * cut.response_length
    assert len(cut.rollout_log_probs or []) == cut.response_length
    assert cut.metadata[slime.METADATA]["censored"] == "abort"
    assert cut.reward == kept.reward  # the mean of the others: there is one


def test_one_sample_at_a_time_finds_its_rollout_again(args: Namespace, backend: RolloutBackend, model: Path) -> None:
    slime.use_backend(backend, AutoTokenizer.from_pretrained(model))
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 24, "skip_special_tokens": False}

    async def group(source: Source, **changed: Any) -> list[Sample]:
        samples = [s for g in source.get_samples(2) for s in g]
        return list(await asyncio.gather(*(slime.generate(args, s, {**sampling, **changed}) for s in samples)))

    first = asyncio.run(group(Source(args)))
    again = asyncio.run(group(Source(args)))
    assert [s.tokens for s in again] == [s.tokens for s in first]
    assert first[0].tokens != first[1].tokens  # the same prompt, another seed
    begun = backend.balance().begun
    assert begun == 4
    with pytest.raises(BadSampling, match="unknown sampling parameters"):
        asyncio.run(group(Source(args), logit_bias={"1": 2.0}))
    slime.let_go(2)
    with pytest.raises(BadInput, match="was consumed or released before"):
        asyncio.run(group(Source(args)))
    assert [c.gone for n, c in sorted(backend.cohorts().items()) if "/sample/" in n] == [1, 1, 0, 0]


def test_every_evaluation_is_of_the_weights_in_force(args: Namespace, backend: RolloutBackend, model: Path) -> None:
    """slime counts the samples of an evaluation from 0 each time, and two data sets may share index and prompt."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 24}

    def evaluate(times: int = 1) -> list[Sample]:
        async def all_of_them() -> list[Sample]:
            samples = [Source(args).get_samples(1)[0][0] for _ in range(times)]
            return list(await asyncio.gather(*(slime.generate(args, s, sampling, evaluation=True) for s in samples)))

        return asyncio.run(all_of_them())

    slime.use_backend(backend, AutoTokenizer.from_pretrained(model))
    begun = backend.balance().begun
    first, twin = evaluate(2)
    assert first.tokens == twin.tokens  # the same request, under the same weights
    assert backend.balance().begun == begun + 2
    slime.use_backend(backend, AutoTokenizer.from_pretrained(model))  # as after a restart
    assert evaluate()[0].tokens == first.tokens
    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.0.mlp.down_proj.weight"))
    version = backend.policy_version + 1
    backend.update_weights({**weights, name: weights[name] + 0.5}, version)
    later = evaluate()[0]
    assert set(later.weight_versions) == {str(version)}
    assert later.tokens != first.tokens
    balance = backend.balance()
    assert balance.begun == begun + 4
    assert not any(c.size > c.gone for n, c in backend.cohorts().items() if "/eval/" in n)


def test_what_cannot_be_honoured_is_refused(args: Namespace, backend: RolloutBackend, model: Path) -> None:
    slime.use_backend(backend, AutoTokenizer.from_pretrained(model))
    with pytest.raises(BadInput, match="--eval-function-path"):
        slime.generate_rollout(args, 0, Source(args), evaluation=True)
    for name, value in (("partial_rollout", True), ("dynamic_sampling_filter_path", "a.b")):
        with pytest.raises(BadInput, match=name):
            slime.generate_rollout(Namespace(**{**vars(args), name: value}), 0, Source(args))
    with_image = Sample(index=0, prompt="1+1=", multimodal_inputs={"images": ["..."]})
    with pytest.raises(BadInput, match="images"):
        asyncio.run(slime.generate(args, with_image, {"max_new_tokens": 4}))
    assert backend.balance().begun == 0


def test_what_slime_lets_others_do_with_the_samples(args: Namespace, backend: RolloutBackend, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    slime.use_backend(backend, tokenizer)
    args.rollout_sample_filter_path = f"{__name__}.drop_the_last"
    args.rollout_all_samples_process_path = f"{__name__}.keep_the_count"
    groups = slime.generate_rollout(args, 0, Source(args))
    assert [[s.remove_sample for s in group] for group in groups] == [[False, False], [False, True]]
    assert args.seen == (4, 2)
    # A data source may tokenize its prompts itself.
    ids = tokenizer.encode("1+2=", add_special_tokens=False)
    sample = Sample(index=9, prompt="not this", tokens=list(ids))
    asyncio.run(slime.generate(args, sample, {"max_new_tokens": 4}))
    assert sample.tokens[: len(ids)] == ids
    # Versions of slime that train under top-p with the candidates of each token have a field for them.
    newer = Sample(index=10, prompt="1+2=")
    newer.rollout_top_p_token_ids = None  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match=r"top-p 0\.9 with slime's replay"):
        asyncio.run(slime.generate(args, newer, {"max_new_tokens": 4, "top_p": 0.9}))
    assert asyncio.run(slime.generate(args, newer, {"max_new_tokens": 4, "top_p": 1.0})).response_length > 0


def test_sampling_parameters_of_slime() -> None:
    params = slime.sampling(
        {
            "temperature": 0.7,
            "top_k": -1,
            "max_new_tokens": 5,
            "min_new_tokens": 2,
            "stop": "END",
            "stop_token_ids": [9],
        }
    )
    assert (params.temperature, params.top_k, params.max_tokens, params.min_tokens) == (0.7, 0, 5, 2)
    assert (params.stop, tuple(params.stop_token_ids)) == (("END",), (9,))
