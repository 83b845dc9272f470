"""SGLang behind the common protocol draws what a plain, unbatched run draws, wherever it is cut."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout_wal.engines.base import Engine, FinishReason
from rollout_wal.errors import ArchitectureMismatch, BackendError, BadInput, BadPrompt, KvError
from rollout_wal.params import SamplingParams
from rollout_wal.testing.engine_suite import plain_run
from rollout_wal.testing.plain_sampler import Unbatched, plain_draw

SAMPLINGS = (
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=40, temperature=0.8, top_k=20, top_p=0.9),
    SamplingParams(max_tokens=40, temperature=1.3, min_p=0.05, top_p=0.95),
    SamplingParams(max_tokens=40, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(max_tokens=40, min_tokens=25, stop_token_ids=tuple(range(4, 40))),
    SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(50, 51, 52, 53)),
    SamplingParams(max_tokens=40, temperature=0.0, frequency_penalty=0.5),
)


@pytest.fixture(autouse=True)
def _nothing_is_left(engine: Any) -> Iterator[None]:
    yield
    for slot in range(64):
        engine.abort(slot)
    for _ in range(4):
        engine.step()
    assert engine.unfinished == 0
    # SGLang's own account of its memory: nothing leaked, whatever was aborted or retracted.
    assert engine._scheduler.is_fully_idle()
    engine._scheduler.on_idle()


def prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 384) for _ in range(rng.randrange(low, high))] for _ in range(count)]


@pytest.fixture(scope="module")
def plain(model: Path) -> Unbatched:
    return plain_run(model)


def test_it_is_an_engine(engine: Any) -> None:
    assert isinstance(engine, Engine)
    assert engine.info.engine == "sglang"
    assert engine.info.dtype == "float32"


def test_it_draws_what_an_unbatched_run_draws(engine: Any, plain: Any, tools: Any) -> None:
    given = prompts(21, 1, 100)  # some longer than a prefill chunk
    requests = [tools.request_of(i, p, SAMPLINGS[i % 7], noise_key=i * 7919) for i, p in enumerate(given)]
    rows = tools.drive(engine, requests)
    ends = set()
    for i, p in enumerate(given):
        expected = plain.run(np.asarray(p), SAMPLINGS[i % 7], i * 7919)
        assert [r[0] for r in rows[i]] == [r[0] for r in expected]
        np.testing.assert_allclose([r[1:3] for r in rows[i]], [r[1:] for r in expected], atol=2e-4)
        assert all(r[3] == FinishReason.RUNNING for r in rows[i][:-1])
        ends.add(FinishReason(rows[i][-1][3]))
    assert ends >= {FinishReason.MAX_TOKENS, FinishReason.STOP_TOKEN, FinishReason.EOS}


def test_cut_anywhere_it_goes_on_as_if_it_had_not_been(engine: Any, tools: Any) -> None:
    rng = random.Random(5)
    given = prompts(14, 2, 60, seed=1)
    whole = tools.drive(engine, [tools.request_of(i, p, SAMPLINGS[i % 7], noise_key=i) for i, p in enumerate(given)])
    for _ in range(3):
        cuts = [rng.randrange(len(whole[i])) for i in range(14)]
        resumed = tools.drive(
            engine,
            [
                tools.request_of(i, p, SAMPLINGS[i % 7], prefix=[r[0] for r in whole[i][: cuts[i]]], noise_key=i)
                for i, p in enumerate(given)
            ],
        )
        for i in range(14):
            left = whole[i][cuts[i] :]
            assert [(r[0], r[3]) for r in resumed[i]] == [(r[0], r[3]) for r in left]
            np.testing.assert_allclose([r[1:3] for r in resumed[i]], [r[1:3] for r in left], atol=2e-4)


def test_observed_tokens_count_neither_as_output_nor_for_the_limits(engine: Any, plain: Any, tools: Any) -> None:
    sampling = SamplingParams(max_tokens=12, min_tokens=8, frequency_penalty=1.0, presence_penalty=0.5)
    prompt, prefix = [9, 10, 11], [20, 21, 20, 22, 23]
    flags = [True, True, False, False, False]
    (rows,) = tools.drive(
        engine, [tools.request_of(3, prompt, sampling, prefix=prefix, sampled=flags, noise_key=5)]
    ).values()
    history = [(t, False) for t in prompt] + list(zip(prefix, flags, strict=True))
    model, sampled = plain.model, 2
    for token, *_ in rows:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[t for t, _ in history]])).logits[0, -1]
        expected = plain_draw(logits.tolist(), sampling, 5, len(history), history=history, eos=plain.eos)
        assert token == expected[0]
        history.append((token, True))
        sampled += 1
    assert sampled >= 8
    assert sampled == 12 or rows[-1][0] in plain.eos


@pytest.fixture(scope="module")
def pressed(plain: Any) -> tuple[list[list[int]], SamplingParams, list[list[int]]]:
    """Prompts that do not fit into the KV cache together, and what they are to become."""
    sampling = SamplingParams(max_tokens=150, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.3)
    given = prompts(8, 80, 120, seed=2)
    return given, sampling, [[r[0] for r in plain.run(np.asarray(p), sampling, i)] for i, p in enumerate(given)]


def run_pressed(engine: Any, tools: Any, pressed: Any) -> int:
    """Returns how many tokens were prefilled, prompts included."""
    given, sampling, expected = pressed
    while not engine._scheduler.is_fully_idle():
        engine.step()
    engine._scheduler.flush_cache()
    for i, p in enumerate(given):
        engine.add(tools.request_of(i, p, sampling, noise_key=i))
    tokens: dict[int, list[int]] = {i: [] for i in range(8)}
    prefilled = retractions = 0
    while engine.unfinished:
        out = engine.step()
        batch = engine._scheduler.last_batch
        prefilled += batch.extend_num_tokens if batch is not None and batch.forward_mode.is_extend() else 0
        for rollout in engine._rollouts.by_rid.values():
            retractions = max(retractions, rollout.req.retraction_count)
            if rollout.req.is_retracted and (kept := engine.save_kv(rollout.request.slot)) is not None:
                # What was computed of a request that waits: a worker that is given notice saves it, too.
                computed = rollout.start + len(rollout.req.output_ids) - 1
                assert engine.kv_tokens(rollout.request.slot) == len(kept) == computed
        for slot, token in zip(out.slot_N.tolist(), out.token_N.tolist(), strict=True):
            tokens[slot].append(token)
    assert retractions > 0, "the KV cache was large enough: this tested nothing"
    assert [tokens[i] for i in range(8)] == expected
    return prefilled


def test_retraction_under_memory_pressure_changes_nothing(engine: Any, tools: Any, pressed: Any) -> None:
    """The KV of what was retracted is kept and put back; without that it is all computed again, to the same effect."""
    kept = engine._retracted
    saved, restored = kept.saved_tokens, kept.restored_tokens
    prefilled = run_pressed(engine, tools, pressed)
    saved, restored = kept.saved_tokens - saved, kept.restored_tokens - restored
    assert saved > 100
    assert not len(kept)
    kept.clear(keeping=False)
    try:
        assert prefilled <= run_pressed(engine, tools, pressed) - saved // 2
    finally:
        kept.clear()
    assert restored >= saved // 2


def test_kept_kv_is_what_the_retracted_go_on_with(
    engine: Any, tools: Any, pressed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong KV does harm: it is really used."""
    save = engine._retracted._kv.save

    def wrong(req: Any) -> Any:
        kv = save(req)
        return replace(kv, parts=tuple(np.zeros_like(part) for part in kv.parts))

    monkeypatch.setattr(engine._retracted._kv, "save", wrong)
    with pytest.raises(AssertionError, match="=="):
        run_pressed(engine, tools, pressed)
    engine._scheduler.flush_cache()


def test_it_stops_at_the_end_of_the_context(engine: Any, tools: Any) -> None:
    limit = engine.info.max_context
    sampling = SamplingParams(max_tokens=4000, ignore_eos=True)
    (prompt,) = prompts(1, limit - 6, limit - 5, seed=3)
    (rows,) = tools.drive(engine, [tools.request_of(0, prompt, sampling)]).values()
    assert len(prompt) + len(rows) == limit
    assert rows[-1][3] == FinishReason.CONTEXT
    # The longest prefix that can still be resumed.
    (last,) = tools.drive(engine, [tools.request_of(0, prompt, sampling, prefix=[r[0] for r in rows[:-1]])]).values()
    assert [(r[0], r[3]) for r in last] == [(rows[-1][0], FinishReason.CONTEXT)]
    with pytest.raises(BadPrompt, match="context"):
        engine.add(tools.request_of(0, prompt * 2, sampling))


def test_what_it_refuses(engine: Any, tools: Any) -> None:
    sampling = SamplingParams(max_tokens=5)
    engine.add(tools.request_of(1, [5, 6], sampling))
    with pytest.raises(BadInput, match="slot 1 is already in use"):
        engine.add(tools.request_of(1, [5, 6], sampling))
    engine.step()
    with pytest.raises(BadInput, match="slot 1 is already in use"):
        engine.add(tools.request_of(1, [5, 6], sampling))
    with pytest.raises(BadPrompt, match="outside of the vocabulary"):
        engine.add(tools.request_of(2, [5, 400], sampling))
    with pytest.raises(BadInput, match="already ends the rollout"):
        engine.add(tools.request_of(2, [5], sampling, prefix=[7, 2]))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_aborted_requests_leave_the_others_alone(engine: Any, tools: Any, steps: int) -> None:
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    given = prompts(12, 3, 90, seed=4)
    alone = tools.drive(engine, [tools.request_of(i, p, sampling, noise_key=i) for i, p in enumerate(given)])
    for i, p in enumerate(given):
        engine.add(tools.request_of(i, p, sampling, noise_key=i))
    tokens: dict[int, list[int]] = {i: [] for i in range(12)}

    def step() -> None:
        out = engine.step()
        for slot, token in zip(out.slot_N.tolist(), out.token_N.tolist(), strict=True):
            tokens[slot].append(token)

    for _ in range(steps):
        step()
    for slot in (0, 3, 7, 11, 40):
        engine.abort(slot)
    before = {slot: len(tokens[slot]) for slot in (0, 3, 7, 11)}
    engine.add(tools.request_of(3, given[5], sampling, noise_key=5))  # the slot is free at once
    tokens[3] = []
    before[3] = 0
    while engine.unfinished:
        step()
    assert tokens.pop(3) == [r[0] for r in alone[5]]
    for slot, rows in tokens.items():
        assert rows == [r[0] for r in alone[slot]][: before.get(slot, 20)]


def test_new_weights_take_over_between_two_tokens(engine: Any, model: Path, successor: Path, tools: Any) -> None:
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    given = prompts(10, 3, 70, seed=6)
    digest = engine.info.weights_digest
    for i, p in enumerate(given):
        engine.add(tools.request_of(i, p, sampling, noise_key=i))
    old: dict[int, list[int]] = {i: [] for i in range(10)}
    new: dict[int, list[int]] = {i: [] for i in range(10)}

    def step(into: dict[int, list[int]]) -> None:
        out = engine.step()
        for slot, token in zip(out.slot_N.tolist(), out.token_N.tolist(), strict=True):
            into[slot].append(token)

    for _ in range(14):
        step(old)
    engine.load_weights(successor, 1)
    assert engine.policy_version == 1
    assert engine.info.weights_digest != digest
    while engine.unfinished:
        step(new)
    # The same from the start of the new weights, all by itself.
    again = tools.drive(
        engine,
        [tools.request_of(i, p, sampling, prefix=old[i], noise_key=i) for i, p in enumerate(given)],
    )
    assert {i: [r[0] for r in rows] for i, rows in again.items()} == new
    tensors = load_file(model / "model.safetensors")
    engine.load_weights(tensors, 2)  # by name, as a trainer hands them over
    assert engine.info.weights_digest == digest
    back = tools.drive(engine, [tools.request_of(i, p, sampling, noise_key=i) for i, p in enumerate(given)])
    assert all([r[0] for r in back[i]][: len(old[i])] == old[i] for i in range(10))
    assert any([r[0] for r in back[i]] != old[i] + new[i] for i in range(10))


def test_other_models_and_damaged_weights_are_refused_and_change_nothing(
    engine: Any, model: Path, tmp_path: Path, tools: Any
) -> None:
    digest, version = engine.info.weights_digest, engine.policy_version
    before = tools.drive(engine, [tools.request_of(0, [5, 6, 7], SAMPLINGS[0])])

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    other = copy("other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (other / "config.json").read_text() != config
    missing = copy("missing")
    tensors = load_file(missing / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, missing / "model.safetensors", metadata={"format": "pt"})
    shaped = copy("shaped")
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": gone[:-1].clone()},
        shaped / "model.safetensors",
        metadata={"format": "pt"},
    )
    short = copy("short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[: len(data) // 2])
    for source, words in (
        (other, "architecture digest"),
        (missing, "lack .'model.layers.1.mlp.up_proj.weight'"),
        (shaped, r"up_proj.weight is \(127, 64\) in the new weights"),
        (short, "cannot be read"),
        ({"nonsense": torch.zeros(1)}, "unknown names"),
    ):
        with pytest.raises((ArchitectureMismatch, BadInput), match=words):
            engine.load_weights(source, version + 1)
    assert (engine.info.weights_digest, engine.policy_version) == (digest, version)
    after = tools.drive(engine, [tools.request_of(0, [5, 6, 7], SAMPLINGS[0])])
    assert [r[0] for r in after[0]] == [r[0] for r in before[0]]
    np.testing.assert_allclose(after[0], before[0], atol=1e-4)


def test_a_token_that_was_not_drawn_here_is_refused(tools: Any) -> None:
    """What the counts and the comparison are for: SGLang appends something else than what was drawn."""
    from rollout_wal.engines.sglang.rollouts import Rollouts

    req = SimpleNamespace(output_ids=[7, 8], full_untruncated_fill_ids=[])
    rollouts = Rollouts(2, (2,), 100)
    rollout = rollouts.add("a", tools.request_of(0, [1, 2], SAMPLINGS[0]), req)
    with pytest.raises(BackendError, match=r"slot 0: SGLang appended the tokens \[7, 8\], and \[\] were drawn"):
        Rollouts.commit(rollout)
    req.output_ids = []
    rollouts.draw(["a"], np.array([2]), False, torch.zeros(1, 384))
    req.output_ids = [rollout.drawn[0].token + 1]
    with pytest.raises(BackendError, match="would not belong"):
        Rollouts.commit(rollout)
    # Two log-probabilities for one token, or none: the same.
    req.output_ids = [rollout.drawn[0].token] * 2
    with pytest.raises(BackendError, match="appended"):
        Rollouts.commit(rollout)
    with pytest.raises(BackendError, match="samples position 9"):
        rollouts.draw(["a"], np.array([9]), False, torch.zeros(1, 384))
    req.output_ids = []
    with pytest.raises(BackendError, match=r"slot .* at position 2"):
        rollouts.draw(["a"], np.array([2]), False, torch.full((1, 384), torch.nan))


def test_saved_kv_is_used_and_says_what_a_prefill_says(engine: Any, tools: Any) -> None:
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    (prompt,) = prompts(1, 70, 71, seed=9)
    engine._scheduler.flush_cache()
    (whole,) = tools.drive(engine, [tools.request_of(0, prompt, sampling, noise_key=1)]).values()
    engine.add(tools.request_of(0, prompt, sampling, noise_key=1))
    tokens: list[int] = []
    while len(tokens) < 30:
        tokens += engine.step().token_N.tolist()
    assert engine.kv_tokens(0) == 99
    kv = engine.save_kv(0)
    assert kv.token_T.tolist() == (prompt + tokens)[:99]
    assert engine.save_kv(7) is None

    def resume(saved: Any, *, beside: bool = False) -> tuple[list[int], int]:
        for _ in range(3):
            engine.abort(0)
            engine.step()
        if not beside:
            engine._scheduler.flush_cache()
        request = tools.request_of(0, prompt, sampling, prefix=tokens, noise_key=1)
        if saved is None:
            engine.add(request)
        else:
            engine.add_with_kv(request, saved)
        first = engine.step()
        (rollout,) = engine._rollouts.by_rid.values()
        cached, rows = int(rollout.req.cached_tokens), first.token_N.tolist()
        while engine.unfinished:
            rows += engine.step().token_N.tolist()
        return rows, cached

    expected = [r[0] for r in whole[30:]]
    assert resume(None) == (expected, 0)
    assert resume(kv) == (expected, 99)
    # Beside what the cache has already: no row is anybody's twice (SGLang counts them when it is idle).
    assert resume(kv, beside=True) == (expected, 99)
    engine.step()
    engine.step()
    engine._scheduler.on_idle()
    # Wrong KV does harm: it is really used.
    wrong = replace(kv, parts=tuple(np.zeros_like(part) for part in kv.parts))
    assert resume(wrong)[0] != expected
    assert resume(kv) == (expected, 99)
    with pytest.raises(KvError):
        engine.add_with_kv(
            tools.request_of(1, prompt, sampling, prefix=tokens),
            replace(kv, parts=tuple(part[:, :, :-1] for part in kv.parts)),
        )
