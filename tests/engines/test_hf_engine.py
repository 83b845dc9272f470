"""The embedded engine's contract: limits, refusals, weights that change in flight, saved KV, noise used once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GptOssConfig, GptOssForCausalLM, MambaConfig, MambaForCausalLM

from rollout_wal.engines.base import Engine, FinishReason, StepOutput
from rollout_wal.engines.common.requests import RequestTable
from rollout_wal.engines.hf import (
    HFEngine,
    RequestKv,
    architecture_digest,
    chat_template_digest,
    parameters,
    tokenizer_digest,
    weights_digest,
)
from rollout_wal.errors import ArchitectureMismatch, BackendError, BadInput, BadPrompt, BadSampling, KvError
from rollout_wal.finish import finish_reason
from rollout_wal.params import SamplingParams
from rollout_wal.sampling import NoiseRows

PROMPT = [5, 80, 200, 17]
EOS = 2


@pytest.fixture
def engine(tiny: Any) -> HFEngine:
    return HFEngine.from_folder(tiny("llama"), max_batch=4)


def drain(engine: HFEngine, slots: int = 1) -> tuple[list[list[int]], list[FinishReason]]:
    tokens: list[list[int]] = [[] for _ in range(slots)]
    reasons = [FinishReason.RUNNING] * slots
    while engine.unfinished:
        out = engine.step()
        for slot, token, finish in zip(out.slot_N, out.token_N, out.finish_N, strict=True):
            tokens[slot].append(int(token))
            reasons[slot] = FinishReason(int(finish))
    return tokens, reasons


def alone(engine: HFEngine, request: Any) -> tuple[list[int], FinishReason]:
    engine.add(request)
    tokens, reasons = drain(engine, request.slot + 1)
    return tokens[request.slot], reasons[request.slot]


def test_it_is_an_engine_and_says_who_it_is(engine: HFEngine, tiny: Any) -> None:
    assert isinstance(engine, Engine)
    info = engine.info
    assert (info.vocab_size, info.max_context, info.eos_token_ids, info.dtype) == (384, 2048, (EOS,), "float32")
    digests = (info.architecture_digest, info.weights_digest, info.tokenizer_digest, info.chat_template_digest)
    assert all(len(d) == 32 and int(d, 16) >= 0 for d in digests)
    assert len(set(digests)) == 4
    again, other = HFEngine.from_folder(tiny("llama")).info, HFEngine.from_folder(tiny("llama", seed=1)).info
    assert again == info
    assert other.architecture_digest == info.architecture_digest
    assert other.weights_digest != info.weights_digest
    assert HFEngine.from_folder(tiny("qwen3")).info.architecture_digest != info.architecture_digest


def test_columns_have_the_contracts_types(engine: HFEngine, request_of: Any) -> None:
    assert len(engine.step().slot_N) == 0  # nothing to do is no error
    engine.add(request_of(65535, PROMPT))
    out = engine.step()
    assert isinstance(out, StepOutput)
    types = [c.dtype.name for c in (out.slot_N, out.token_N, out.logprob_N, out.sampling_logprob_N, out.finish_N)]
    assert types == ["uint16", "uint32", "float32", "float32", "uint8"]
    assert out.slot_N.tolist() == [65535]


def test_max_tokens_counts_the_sampled_prefix_but_not_the_observed(engine: HFEngine, request_of: Any) -> None:
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    tokens, reason = alone(engine, request_of(0, PROMPT, sampling, prefix=[9, 10, 11, 12], prefix_sampled=[1, 0, 0, 1]))
    assert (len(tokens), reason) == (4, FinishReason.MAX_TOKENS)


def test_the_context_limit_ends_a_rollout(tiny: Any, request_of: Any) -> None:
    engine = HFEngine.from_folder(tiny("llama", max_context=40))
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    tokens, reason = alone(engine, request_of(0, list(range(10, 40)), sampling))
    assert (len(tokens), reason) == (10, FinishReason.CONTEXT)
    tokens, reason = alone(engine, request_of(0, list(range(4, 43)), sampling))
    assert (len(tokens), reason) == (1, FinishReason.CONTEXT)
    with pytest.raises(BadPrompt, match="40 tokens leave no room"):
        engine.add(request_of(0, list(range(4, 44)), sampling))
    with pytest.raises(BadInput, match=r"already ends the rollout \(CONTEXT"):
        engine.add(request_of(0, list(range(4, 34)), sampling, prefix=[5] * 10))


def test_stop_tokens_and_min_tokens(engine: HFEngine, request_of: Any) -> None:
    free, _ = alone(engine, request_of(0, PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), noise_key=5))
    stop = free[10]
    first = free.index(stop)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,))
    tokens, reason = alone(engine, request_of(0, PROMPT, sampling, noise_key=5))
    assert (tokens, reason) == (free[: first + 1], FinishReason.STOP_TOKEN)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,), min_tokens=20)
    tokens, _ = alone(engine, request_of(0, PROMPT, sampling, noise_key=5))
    assert stop not in tokens[:20]


def test_end_of_sequence_ends_unless_ignored_or_too_early(tiny: Any, request_of: Any) -> None:
    engine = HFEngine.from_folder(tiny("llama", mean_length=3.0), max_batch=64)
    options = [{}, {"min_tokens": 25}, {"ignore_eos": True}]
    for i, extra in enumerate(options * 20):
        engine.add(request_of(i, PROMPT, SamplingParams(max_tokens=40, **extra), noise_key=i))  # type: ignore[arg-type]
    tokens, reasons = drain(engine, 60)
    for i, (ids, reason) in enumerate(zip(tokens, reasons, strict=True)):
        if i % 3 == 2:
            assert len(ids) == 40
            assert reason is FinishReason.MAX_TOKENS
        else:
            assert reason is FinishReason.EOS or len(ids) == 40
            assert EOS not in ids[:-1]
            assert i % 3 == 0 or len(ids) > 25
    assert sum(len(ids) < 10 for ids in tokens[::3]) > 10
    assert any(EOS in ids[:-1] for ids in tokens[2::3])


@pytest.mark.parametrize(
    ("prefix", "sampling", "reason"),
    [
        ([9, EOS], SamplingParams(), "EOS"),
        ([9, 33], SamplingParams(stop_token_ids=(33,)), "STOP_TOKEN"),
        ([9, 33], SamplingParams(max_tokens=2), "MAX_TOKENS"),
    ],
    ids=["eos", "stop", "max"],
)
def test_a_finished_prefix_is_refused(
    engine: HFEngine, request_of: Any, prefix: list[int], sampling: SamplingParams, reason: str
) -> None:
    with pytest.raises(BadInput, match=f"already ends the rollout .{reason}"):
        engine.add(request_of(0, PROMPT, sampling, prefix=prefix))
    assert engine.unfinished == 0


def test_end_of_sequence_that_was_observed_ends_nothing(engine: HFEngine, request_of: Any) -> None:
    request = request_of(0, PROMPT, SamplingParams(max_tokens=3), prefix=[9, EOS], prefix_sampled=[1, 0])
    assert len(alone(engine, request)[0]) >= 1


def test_bad_requests_change_nothing(engine: HFEngine, request_of: Any) -> None:
    engine.add(request_of(3, PROMPT))
    bad = [
        (request_of(0, []), BadPrompt, "prompt is empty"),
        (request_of(0, [5, 384]), BadPrompt, "prompt token 384 at index 1"),
        (request_of(0, [5], prefix=[-1]), BadPrompt, "prefix token -1 at index 0"),
        (request_of(3, PROMPT), BadInput, "slot 3 is already in use"),
        (request_of(1 << 16, PROMPT), BadInput, "not in 0..65535"),
        (request_of(0, PROMPT, noise_key=1 << 64), BadSampling, "noise key"),
        (request_of(0, PROMPT, noise_key=-1), BadSampling, "noise key"),
        (request_of(0, PROMPT, SamplingParams(stop_token_ids=(384,))), BadSampling, "stop tokens .384."),
        (request_of(0, PROMPT, prefix=[5], prefix_sampled=[]), BadInput, "1 prefix tokens but 0 flags"),
    ]
    for request, error, message in bad:
        with pytest.raises(error, match=message):
            engine.add(request)
    engine.step()
    with pytest.raises(BadInput, match="slot 3 is already in use"):  # running, not only waiting
        engine.add(request_of(3, PROMPT))
    assert engine.unfinished == 1
    engine.abort(3)
    engine.abort(3)  # unknown slots are ignored
    assert engine.unfinished == 0


def test_aborting_a_waiting_request(engine: HFEngine, request_of: Any) -> None:
    for slot in range(6):  # two more than run at once
        engine.add(request_of(slot, PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)))
    engine.step()
    engine.abort(5)
    tokens, _ = drain(engine, 6)
    assert [len(t) for t in tokens] == [1, 1, 1, 1, 2, 0]


def test_closing_forgets_running_and_waiting_requests(engine: HFEngine, request_of: Any) -> None:
    for slot in range(6):
        engine.add(request_of(slot, PROMPT))
    engine.step()
    engine.close()
    assert engine.unfinished == 0
    assert len(engine.step().slot_N) == 0


def test_the_tokens_before_the_end_do_not_depend_on_where_a_rollout_was_split(tiny: Any, request_of: Any) -> None:
    engine = HFEngine.from_folder(tiny("llama"), max_batch=64)
    sampling = SamplingParams(max_tokens=40, temperature=1.1, top_p=0.95)
    whole, _ = alone(engine, request_of(0, PROMPT, sampling, noise_key=99))
    for cut in range(len(whole)):
        engine.add(request_of(cut, PROMPT, sampling, prefix=whole[:cut], noise_key=99))
    tokens, _ = drain(engine, len(whole))
    assert all(whole[:cut] + rest == whole for cut, rest in enumerate(tokens))


@settings(max_examples=25, deadline=None)
@given(
    rollouts=st.integers(1, 4),
    lives=st.lists(st.tuples(st.sampled_from([3, 16, 64]), st.integers(1, 12)), max_size=6),
    top_k=st.sampled_from([0, 30]),
)
def test_no_noise_is_used_twice_within_a_rollout(
    rollouts: int, lives: list[tuple[int, int]], top_k: int, tiny: Any, request_of: Any
) -> None:
    """Random resumes that keep what was logged: each (key, position) is drawn at exactly once, in order.

    What a resume loses it draws again with the same noise, by design; the schedule here loses nothing.
    """
    drawn: list[tuple[int, int]] = []
    original = NoiseRows.__init__

    def recording(self: NoiseRows, keys: Any, positions: Any, device: Any) -> None:
        drawn.extend(zip(keys.tolist(), positions.tolist(), strict=True))
        original(self, keys, positions, device)

    sampling = SamplingParams(max_tokens=20, ignore_eos=True, top_k=top_k)
    output: list[list[int]] = [[] for _ in range(rollouts)]
    NoiseRows.__init__ = recording  # type: ignore[method-assign]
    try:
        for prefill_chunk, steps in [*lives, (64, 1000)]:  # the last life sees all of them through
            # Every life is a fresh engine: nothing survives but the tokens.
            engine = HFEngine.from_folder(tiny("llama"), prefill_chunk=prefill_chunk)
            for i, ids in enumerate(output):
                if len(ids) < 20:
                    engine.add(request_of(i, PROMPT[: i + 1], sampling, prefix=ids, noise_key=1000 + i))
            for _ in range(steps):
                if not engine.unfinished:
                    break
                out = engine.step()
                for slot, token in zip(out.slot_N, out.token_N, strict=True):
                    output[slot].append(int(token))
    finally:
        NoiseRows.__init__ = original  # type: ignore[method-assign]
    for i in range(rollouts):
        mine = [position for key, position in drawn if key == 1000 + i]
        assert mine == list(range(i + 1, i + 21))  # every position once


def test_weights_may_change_in_flight(tiny: Any, request_of: Any, unbatched: Any) -> None:
    """Tokens stay, and the next one is what the new weights say about all of them: no old KV is left."""
    new_folder = tiny("llama", seed=1)
    engine = HFEngine.from_folder(tiny("llama"), prefill_chunk=16)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    for slot in range(3):
        engine.add(request_of(slot, PROMPT * (1 + 4 * slot), sampling, noise_key=slot))
    tokens: list[list[int]] = [[], [], []]
    for step in range(200):
        if step == 12:
            before = [list(ids) for ids in tokens]
            engine.load_weights(new_folder, 7)
        out = engine.step()
        for slot, token in zip(out.slot_N, out.token_N, strict=True):
            tokens[slot].append(int(token))
    assert engine.unfinished == 0
    assert engine.policy_version == 7
    assert engine.info.weights_digest == HFEngine.from_folder(new_folder).info.weights_digest
    assert all(0 < len(ids) < 30 for ids in before)
    for slot, ids in enumerate(before):
        fresh = HFEngine.from_folder(new_folder)
        rest, _ = alone(fresh, request_of(slot, PROMPT * (1 + 4 * slot), sampling, prefix=ids, noise_key=slot))
        assert tokens[slot] == ids + rest


def test_weights_from_tensors(tiny: Any, unbatched: Any) -> None:
    engine = HFEngine.from_folder(tiny("llama"))
    other = unbatched(tiny("llama", seed=1)).model
    engine.load_weights(other.state_dict(), 3)
    assert engine.info.weights_digest == weights_digest(parameters(other))


def test_weights_in_memory_are_not_the_file_s(tiny: Any, tmp_path: Path) -> None:
    """What was loaded stays what it was, whoever writes into the checkpoint."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    engine = HFEngine.from_folder(folder)
    before = {name: p.clone() for name, p in engine._model.named_parameters()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x7f" * 4096)
    for name, parameter in engine._model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_other_architectures_are_refused_and_the_old_weights_stay(tiny: Any, unbatched: Any, request_of: Any) -> None:
    engine = HFEngine.from_folder(tiny("llama"))
    before = engine.info
    weights = unbatched(tiny("llama", seed=1)).model.state_dict()
    lacking = {k: v for k, v in weights.items() if "q_proj" not in k}
    narrow = {k: v[:-1] if k == "lm_head.weight" else v for k, v in weights.items()}
    for source in (tiny("qwen3"), tiny("llama", vocab_size=400), lacking, narrow, {**weights, "extra": torch.ones(1)}):
        with pytest.raises(ArchitectureMismatch, match="old weights stay"):
            engine.load_weights(source, 9)
    assert engine.policy_version == 0
    assert weights_digest(parameters(engine._model)) == before.weights_digest


def test_saved_kv_is_taken_back_and_used(tiny: Any, request_of: Any) -> None:
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    whole, _ = alone(HFEngine.from_folder(tiny("gemma")), request_of(0, PROMPT * 20, sampling, noise_key=1))
    engine = HFEngine.from_folder(tiny("gemma"), prefill_chunk=1000)
    engine.add(request_of(0, PROMPT * 20, sampling, noise_key=1))
    for _ in range(10):
        engine.step()
    kv = engine.export_kv(0)
    assert (kv.tokens, len(kv.layers), kv.layers[0][0].shape) == (89, 2, (2, 89, 16))
    resumed = HFEngine.from_folder(tiny("gemma"), prefill_chunk=1)  # computing it again would take 89 steps
    resumed.add(request_of(0, PROMPT * 20, sampling, prefix=whole[:10], noise_key=1), kv=kv)
    assert resumed.step().token_N.tolist() == [whole[10]]
    assert drain(resumed)[0][0] == whole[11:]
    # Wrong KV shows: it is really read.
    wrong = RequestKv(89, tuple((k.flip(1), v.flip(1)) for k, v in kv.layers))
    poisoned = HFEngine.from_folder(tiny("gemma"))
    poisoned.add(request_of(0, PROMPT * 20, sampling, prefix=whole[:10], noise_key=1), kv=wrong)
    assert drain(poisoned)[0][0] != whole[10:]


def test_saved_kv_that_does_not_fit_is_refused(engine: HFEngine, request_of: Any) -> None:
    pair = (torch.zeros(2, 3, 16), torch.zeros(2, 3, 16))
    for kv in (RequestKv(3, (pair,)), RequestKv(2, (pair, pair))):
        with pytest.raises(KvError, match="computed again"):
            engine.add(request_of(0, PROMPT), kv=kv)
    with pytest.raises(BadInput, match="saved KV of 3 tokens for a request of 3"):
        engine.add(request_of(0, PROMPT[:3]), kv=RequestKv(3, (pair, pair)))
    assert engine.unfinished == 0
    assert engine.export_kv(0) == RequestKv(0, ())


def test_unusable_logits_stop_the_step_for_all_and_the_rest_goes_on(tiny: Any, request_of: Any) -> None:
    """A NaN embedding poisons one request; its batch-mates get what they would have got without it."""
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    want, _ = alone(HFEngine.from_folder(tiny("llama")), request_of(1, PROMPT, sampling, noise_key=4))
    engine = HFEngine.from_folder(tiny("llama"))
    with torch.no_grad():
        engine._model.get_input_embeddings().weight[300] = float("nan")
    engine.add(request_of(1, PROMPT, sampling, noise_key=4))
    engine.add(request_of(0, [9, 300] + [10] * 38, sampling))
    for _ in range(2):  # the error is stable: nothing advanced
        with pytest.raises(BackendError, match="slot 0 at position 40 hold NaN"):
            engine.step()
    engine.abort(0)
    # Takes over the row, whose later positions hold NaN still: masked, but NaN times zero is NaN.
    engine.add(request_of(2, PROMPT, sampling, noise_key=4))
    tokens, _ = drain(engine, 3)
    assert tokens[1] == tokens[2] == want


def test_long_rollouts_move_to_larger_rows(tiny: Any, request_of: Any) -> None:
    """Past 256 and 512 tokens, beside short ones that come and go."""
    sampling = SamplingParams(max_tokens=600, ignore_eos=True)
    want, _ = alone(HFEngine.from_folder(tiny("gemma")), request_of(0, PROMPT, sampling, noise_key=3))
    engine = HFEngine.from_folder(tiny("gemma"), max_batch=3)
    engine.add(request_of(0, PROMPT, sampling, noise_key=3))
    got: list[int] = []
    slot = 0
    while len(got) < 600:
        if engine.unfinished < 4:
            slot += 1
            short = SamplingParams(max_tokens=5 + slot % 37, ignore_eos=True)
            engine.add(request_of(slot, PROMPT * (1 + slot % 90), short))
        out = engine.step()
        got += [int(t) for s, t in zip(out.slot_N, out.token_N, strict=True) if s == 0]
    assert got == want


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_columns_finish_as_the_predicate_does(data: st.DataObject, request_of: Any) -> None:
    eos, max_context = (2, 5), 12
    table = RequestTable(4, eos, max_context)
    rows, requests, tokens = [], [], []
    for slot in range(data.draw(st.integers(1, 4))):
        max_tokens = data.draw(st.integers(1, 8))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=data.draw(st.integers(0, max_tokens)),
            stop_token_ids=tuple(data.draw(st.lists(st.integers(0, 7), max_size=3))),
            ignore_eos=data.draw(st.booleans()),
        )
        flags = data.draw(st.lists(st.booleans(), max_size=8))
        requests.append(
            request_of(
                slot, [1] * data.draw(st.integers(1, 6)), sampling, prefix=[7] * len(flags), prefix_sampled=flags
            )
        )
        rows.append(table.add(requests[-1]))
        tokens.append(data.draw(st.integers(0, 7)))
    finish = table.append(np.array(rows), np.array(tokens))
    for request, token, got in zip(requests, tokens, finish, strict=True):
        want = finish_reason(
            token,
            sampled=int(request.prefix_sampled.sum()) + 1,
            length=len(request.prompt) + len(request.prefix) + 1,
            sampling=request.sampling,
            eos_token_ids=eos,
            max_context=max_context,
        )
        assert got == want


def test_attention_sinks_are_honoured(tmp_path: Path, request_of: Any) -> None:
    """gpt-oss: learned sinks and alternating windows, grouped queries."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        max_position_embeddings=256, eos_token_id=0, pad_token_id=1,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GptOssForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.uniform_(1, 3)
                elif parameter.dim() > 1:
                    parameter.normal_(std=0.4)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    engine = HFEngine.from_folder(tmp_path, prefill_chunk=7)
    prompts = [[5, 9, 33], list(range(4, 44))]
    for slot, prompt in enumerate(prompts):
        engine.add(request_of(slot, prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    rows: list[list[tuple[int, float]]] = [[], []]
    while engine.unfinished:
        out = engine.step()
        for slot, token, logprob in zip(out.slot_N, out.token_N, out.logprob_N, strict=True):
            rows[slot].append((int(token), float(logprob)))
    for prompt, got in zip(prompts, rows, strict=True):
        ids = [t for t, _ in got]
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt + ids]), use_cache=False).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
        np.testing.assert_allclose([lp for _, lp in got], logprobs[at, torch.tensor(ids)], atol=1e-4)
        assert logprobs[at].argmax(-1).tolist() == ids


def test_models_with_other_caches_are_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="No model was loaded"):
        HFEngine.from_folder(tmp_path)


def test_bad_folders_and_options_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        HFEngine.from_folder(tmp_path)
    with pytest.raises(BadInput, match="unknown dtype 'float8'"):
        HFEngine.from_folder(tiny("llama"), dtype="float8")
    with pytest.raises(BadInput, match="must both be at least 1"):
        HFEngine.from_folder(tiny("llama"), max_batch=0)


def test_damaged_and_incomplete_weights_are_refused(tiny: Any, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny("llama") / name).read_bytes())
    with pytest.raises(BadInput, match="No model was loaded"):  # no weights at all
        HFEngine.from_folder(tmp_path)
    weights = load_file(tiny("llama") / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lack.*layers\.1\.mlp\.up_proj.*random"):
        HFEngine.from_folder(tmp_path)
    engine = HFEngine.from_folder(tiny("llama"))
    before = engine.info.weights_digest
    with pytest.raises(BadInput, match="No model was loaded"):
        engine.load_weights(tmp_path, 1)
    assert (engine.policy_version, weights_digest(parameters(engine._model))) == (0, before)
    (tmp_path / "model.safetensors").write_bytes((tiny("llama") / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BadInput, match="No model was loaded"):
        HFEngine.from_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(tiny: Any, request_of: Any, dtype: str) -> None:
    engine = HFEngine.from_folder(tiny("gemma"), dtype=dtype)
    assert engine.info.dtype == dtype
    assert engine.info.architecture_digest == HFEngine.from_folder(tiny("gemma")).info.architecture_digest
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    for slot in range(3):
        engine.add(request_of(slot, PROMPT * (slot + 1), sampling))
    assert [len(ids) for ids in drain(engine, 3)[0]] == [20] * 3


def test_digests_can_be_taken_without_an_engine(tiny: Any, unbatched: Any, tmp_path: Path) -> None:
    folder = tiny("llama")
    info = HFEngine.from_folder(folder).info
    assert architecture_digest(AutoConfig.from_pretrained(folder).to_dict()) == info.architecture_digest
    assert weights_digest(parameters(unbatched(folder).model)) == info.weights_digest
    assert tokenizer_digest(folder) == info.tokenizer_digest
    assert chat_template_digest(folder) == info.chat_template_digest
    assert (tokenizer_digest(tmp_path), chat_template_digest(tmp_path)) == ("", "")
    # Another layout of the same JSON is the same tokenizer; another merge is not.
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=7), encoding="utf-8")
    assert tokenizer_digest(tmp_path) == info.tokenizer_digest
    changed = json.loads(text)
    changed["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    assert tokenizer_digest(tmp_path) != info.tokenizer_digest
    # One flipped bit, one name, one shape.
    weights = {"a": torch.zeros(2, 3)}
    others = ({"a": torch.zeros(3, 2)}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3).double()})
    assert len({weights_digest(w) for w in (weights, *others, {"a": -torch.zeros(2, 3)})}) == 5


def test_without_its_extra_the_engine_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from rollout_wal.errors import MissingExtra\n"
        "try:\n    import rollout_wal.engines.hf\nexcept MissingExtra as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'rollout-wal[hf]'" in result.stdout
