"""The adapter on the real engine: the tokens are the ones the project's sampler draws, wherever they were split."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rollout_wal.engines.base import Engine, FinishReason
from rollout_wal.engines.vllm import support
from rollout_wal.errors import ArchitectureMismatch, BadInput, BadPrompt, HookMoved, UnsupportedEngine
from rollout_wal.params import SamplingParams

RNG = np.random.default_rng(7)
SAMPLING = [
    SamplingParams(max_tokens=60),
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=50),
    SamplingParams(temperature=1.3, top_k=20, min_tokens=30, max_tokens=60),
    SamplingParams(temperature=0.0, max_tokens=40),
    SamplingParams(
        min_p=0.05,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        max_tokens=60,
        ignore_eos=True,
    ),
    SamplingParams(max_tokens=40, stop_token_ids=tuple(range(40, 70)), min_tokens=5),
]
PROMPTS = [RNG.integers(4, 380, size=int(n)).tolist() for n in (3, 90, 17, 150, 40, 64)]
KEYS = [int(k) for k in RNG.integers(0, 2**64, size=6, dtype=np.uint64)]


def requests(tools: SimpleNamespace) -> list[Any]:
    return [
        tools.request_of(i, p, s, noise_key=k) for i, (p, s, k) in enumerate(zip(PROMPTS, SAMPLING, KEYS, strict=True))
    ]


@pytest.fixture(scope="module")
def whole(engine: Any, tools: SimpleNamespace) -> dict[int, list[Any]]:
    """Uninterrupted, all together."""
    rows: dict[int, list[Any]] = tools.drive(engine, requests(tools))
    return rows


def test_it_is_an_engine(engine: Any) -> None:
    assert isinstance(engine, Engine)
    assert engine.info.engine == "vllm"
    assert engine.info.max_context == 512
    assert engine.info.extras["model_runner"] == os.environ.get("MODEL_RUNNER", "v1")


@pytest.mark.parametrize("index", range(6))
def test_tokens_and_logprobs_are_those_of_the_plain_sampler(
    index: int, whole: dict[int, list[Any]], oracle: ModuleType, model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype="float32", attn_implementation="eager").eval()
    alone = oracle.Unbatched(lm, (lm.config.eos_token_id,))
    expected = alone.run(np.array(PROMPTS[index]), SAMPLING[index], KEYS[index])
    rows = whole[index]
    assert [r[0] for r in rows] == [e[0] for e in expected]
    np.testing.assert_allclose([r[1] for r in rows], [e[1] for e in expected], atol=2e-4)
    np.testing.assert_allclose([r[2] for r in rows], [e[2] for e in expected], atol=2e-4)
    assert all(r[3] == 0 for r in rows[:-1])
    assert rows[-1][3] != 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_a_resume_anywhere_goes_on_identically(
    share: float, engine: Any, tools: SimpleNamespace, whole: dict[int, list[Any]]
) -> None:
    cut = {i: max(1, int(len(rows) * share)) for i, rows in whole.items() if len(rows) > 1}
    again = tools.drive(
        engine,
        [
            tools.request_of(i, PROMPTS[i], SAMPLING[i], prefix=[r[0] for r in whole[i][:at]], noise_key=KEYS[i])
            for i, at in cut.items()
        ],
    )
    for i, at in cut.items():
        assert again[i] == whole[i][at:], i


def test_who_else_is_in_the_batch_does_not_matter(
    engine: Any, tools: SimpleNamespace, whole: dict[int, list[Any]]
) -> None:
    for request in requests(tools)[::2]:
        assert tools.drive(engine, [request])[request.slot] == whole[request.slot]


def test_preempted_requests_go_on_identically(
    engine: Any, tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=300, ignore_eos=True, frequency_penalty=0.1)
    many = [tools.request_of(i, PROMPTS[i % 6], sampling, noise_key=100 + i) for i in range(8)]
    alone = {r.slot: tools.drive(engine, [r])[r.slot] for r in many[:3]}
    scheduler = engine._core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request
    monkeypatch.setattr(
        scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r.request_id), original(r, *a, **k))[1]
    )
    together = tools.drive(engine, many)
    assert preempted, "the KV cache was large enough for all: the test tests nothing"
    assert all(len(rows) == 300 for rows in together.values())
    for slot, rows in alone.items():
        assert together[slot] == rows


def test_observed_tokens_are_neither_counted_nor_penalised_as_output(
    engine: Any, tools: SimpleNamespace, oracle: ModuleType, model: Path
) -> None:
    from rollout_wal.engines.hf import HFEngine

    sampling = SamplingParams(max_tokens=20, min_tokens=15, presence_penalty=1.5, repetition_penalty=1.2)
    prefix = RNG.integers(4, 380, size=30).tolist()
    flags = [i % 3 == 0 for i in range(30)]  # 10 sampled, so 10 more to come
    request = tools.request_of(0, PROMPTS[0], sampling, prefix=prefix, sampled=flags, noise_key=5)
    embedded = HFEngine.from_folder(model)
    ours, theirs = tools.drive(engine, [request])[0], tools.drive(embedded, [request])[0]
    assert [(r[0], r[3]) for r in ours] == [(r[0], r[3]) for r in theirs]
    assert len(ours) <= 10


def test_the_context_is_the_end(engine: Any, tools: SimpleNamespace) -> None:
    sampling = SamplingParams(max_tokens=400, ignore_eos=True)
    rows = tools.drive(engine, [tools.request_of(0, [5] * 500, sampling, noise_key=1)])[0]
    assert len(rows) == 12
    assert rows[-1][3] == FinishReason.CONTEXT
    rows = tools.drive(engine, [tools.request_of(0, [5] * 500, sampling, prefix=[6] * 11, noise_key=1)])[0]
    assert len(rows) == 1
    with pytest.raises(BadPrompt):
        engine.add(tools.request_of(0, [5] * 512, sampling))
    with pytest.raises(BadInput, match="already ends"):
        engine.add(tools.request_of(0, [5] * 500, sampling, prefix=[6] * 12))


def test_what_cannot_be_run_is_refused_and_changes_nothing(engine: Any, tools: SimpleNamespace) -> None:
    engine.add(tools.request_of(3, [5, 6], SamplingParams(max_tokens=2)))
    for bad in (
        tools.request_of(3, [5], SamplingParams()),
        tools.request_of(4, [], SamplingParams()),
        tools.request_of(4, [384], SamplingParams()),
        tools.request_of(4, [5], SamplingParams(stop_token_ids=(999,))),
    ):
        with pytest.raises(BadInput):
            engine.add(bad)
    assert engine.unfinished == 1
    engine.abort(9)
    engine.abort(3)
    assert engine.unfinished == 0
    assert not len(engine.step().slot_N)


def test_an_aborted_slot_can_be_used_again_at_once(engine: Any, tools: SimpleNamespace, whole: Any) -> None:
    long = tools.request_of(0, [9] * 30, SamplingParams(max_tokens=300, ignore_eos=True), noise_key=3)
    engine.add(long)
    for _ in range(4):
        engine.step()
    engine.abort(0)
    assert tools.drive(engine, requests(tools)[:1])[0] == whole[0]


def test_saved_kv_is_loaded_instead_of_computed(
    engine: Any, tools: SimpleNamespace, whole: dict[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout_wal.engines.vllm.connector import BlockConnector
    from rollout_wal.kv import KvLayout, SupportsKv

    assert isinstance(engine, SupportsKv)
    layout = KvLayout.parse(engine.kv_layout())
    saved: dict[int, Any] = {}

    def save(step: int, rows: dict[int, list[Any]]) -> None:
        for slot in (1, 4):
            if slot not in saved and len(rows[slot]) == 20:
                saved[slot] = (engine.save_kv(slot), [r[0] for r in rows[slot]])

    assert tools.drive(engine, requests(tools), save) == whole
    for slot, (kv, prefix) in saved.items():
        kv.check(layout)
        # Decoded tokens too, in whole blocks; the last token sampled is never computed.
        assert len(kv) == (len(PROMPTS[slot]) + 19) // 32 * 32
        assert kv.token_T.tolist() == [*PROMPTS[slot], *prefix][: len(kv)]

    def resume(slot: int, arrays: Any) -> list[Any]:
        prefix = saved[slot][1]
        engine.add_with_kv(
            tools.request_of(slot, PROMPTS[slot], SAMPLING[slot], prefix=prefix, noise_key=KEYS[slot]), arrays
        )
        rows: list[Any] = []
        while engine.unfinished:
            out = engine.step()
            rows += [
                (int(t), float(a), float(b), int(f))
                for t, a, b, f in zip(out.token_N, out.logprob_N, out.sampling_logprob_N, out.finish_N, strict=True)
            ]
        return rows

    for slot, (kv, _) in saved.items():
        engine._core.reset_prefix_cache()
        before = BlockConnector.loaded_tokens
        assert resume(slot, kv) == whole[slot][20:]
        assert BlockConnector.loaded_tokens - before == len(kv)
    # Were the KV not what attention reads, this would be equal too.
    kv, _ = saved[1]
    wrong = type(kv)(kv.token_T, tuple(np.roll(part, 1, axis=-1) for part in kv.parts), kv.states)
    engine._core.reset_prefix_cache()
    assert resume(1, wrong) != whole[1][20:]
    engine._core.reset_prefix_cache()
    assert not BlockConnector.offered


def test_new_weights_take_over_in_flight(
    engine: Any, tools: SimpleNamespace, whole: dict[int, list[Any]], model: Path, successor: Path
) -> None:
    before = engine.info.weights_digest

    def update(step: int, _: object) -> None:
        if step == 12:
            engine.load_weights(successor, 1)

    mixed = tools.drive(engine, requests(tools), update)
    assert engine.policy_version == 1
    assert engine.info.weights_digest != before
    at = {i: next((n for n, (a, b) in enumerate(zip(whole[i], rows)) if a != b), None) for i, rows in mixed.items()}
    changed = [i for i, n in at.items() if n is not None]
    assert len(changed) >= 4, "the weights made no difference: the test tests nothing"
    # From the update on it is the new model's output over all tokens before, with nothing of the old one's KV.
    cut = {i: at[i] for i in changed if at[i]}
    again = tools.drive(
        engine,
        [
            tools.request_of(i, PROMPTS[i], SAMPLING[i], prefix=[r[0] for r in mixed[i][:n]], noise_key=KEYS[i])
            for i, n in cut.items()
        ],
    )
    for i, n in cut.items():
        assert again[i] == mixed[i][n:], i
    engine.load_weights(model, 2)
    assert engine.info.weights_digest == before
    assert tools.drive(engine, requests(tools)) == whole


def test_other_models_and_broken_files_leave_the_weights_in_force(
    engine: Any, tools: SimpleNamespace, whole: dict[int, list[Any]], successor: Path, tmp_path: Path
) -> None:
    version, digest = engine.policy_version, engine.info.weights_digest
    other = tmp_path / "other"
    shutil.copytree(successor, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 123.0, "rms_norm_eps": 0.1}))
    cut = tmp_path / "cut"
    shutil.copytree(successor, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, error in ((other, ArchitectureMismatch), (cut, BadInput), (empty, ArchitectureMismatch)):
        with pytest.raises(error):
            engine.load_weights(folder, 9)
    assert (engine.policy_version, engine.info.weights_digest) == (version, digest)
    assert tools.drive(engine, requests(tools)[:2]) == {i: whole[i] for i in range(2)}


def test_another_vllm_is_refused_with_the_range(engine: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(UnsupportedEngine, match=r"supports vLLM >=0\.32\.0,<0\.33"):
        type(engine).from_folder(model)


@pytest.mark.parametrize("hooks", [support.ENGINE_HOOKS, support.SCHEDULER_HOOKS], ids=["engine", "scheduler"])
def test_every_hook_is_where_it_was(hooks: tuple[Any, ...]) -> None:
    """Fails when an upgrade of vLLM moves something that the adapter or the scheduler hooks into."""
    support.check(hooks)


def test_a_moved_hook_is_found_at_start(engine: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, output: None)
    with pytest.raises(HookMoved, match="update_from_output takes"):
        support.check(support.SCHEDULER_HOOKS)
    monkeypatch.undo()
    for name in ("set_weight_version", "collective_rpc", "sleep"):
        monkeypatch.delattr(EngineCore, name)
        with pytest.raises(HookMoved, match=f"{name} is gone"):
            support.check(support.SCHEDULER_HOOKS)
        monkeypatch.undo()


def test_arguments_that_break_the_sampling_are_refused(engine: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="speculative_config"):
        type(engine).from_folder(model, speculative_config={"method": "ngram"})
    with pytest.raises(BadInput, match="Pass max_batch"):
        type(engine).from_folder(model, max_num_seqs=4)
    with pytest.raises(BadInput, match="pipeline_parallel_size=2"):
        type(engine).from_folder(model, pipeline_parallel_size=2)
    with pytest.raises(BadInput, match=r"config\.json"):
        type(engine).from_folder(tmp_path)


def test_a_configuration_that_would_not_log_is_refused_by_name() -> None:
    from rollout_wal.engines.vllm.config import check_config, options_of

    for options in (
        {},
        {"logs": "x"},
        {"log": "x", "polcy": {}},
        {"log": "x", "policy_version": "latest"},
        {"log": "x", "policy_version": -1},
        {"log": "x", "policy": {"kinds": "group"}},
        {"log": "x", "policy": {"kind": "groups"}},
    ):
        with pytest.raises(BadInput, match="vLLM was not started"):
            options_of(SimpleNamespace(additional_config={"rollout_wal": options}))
    good = {
        "logits_processors": ["rollout_wal.engines.vllm.processor:PositionNoise"],
        "logprobs_mode": "raw_logprobs",
    }

    def config(speculative: Any = None, **model: Any) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(**{**good, **model}),
            speculative_config=speculative,
        )

    check_config(config())
    for bad, what in (
        (config(logits_processors=None), "the sampler is missing"),
        (config(logprobs_mode="processed_logprobs"), "logprobs_mode"),
        (config(speculative={}), "speculative"),
    ):
        with pytest.raises(BadInput, match=what):
            check_config(bad)
