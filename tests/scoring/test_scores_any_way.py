"""However the work is cut, shared, evicted, cached and sent, the scores are those of a direct forward."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scoring.client import AsyncScoringClient
from scoring.errors import TeacherFailed
from scoring.items import ScoreItem, Scores
from scoring.residency import Residency
from scoring.scheduler import Limits, Scheduler
from scoring.server import serve
from scoring.teachers.hf import HfTeacherSource, freeze, loaded_bytes

MODELS = ("llama", "gemma2")


@pytest.fixture(scope="module")
def direct(tiny: Callable[..., Path]) -> dict[str, Any]:
    return {name: AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32) for name in MODELS}


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # factories
@given(
    seed=st.integers(0, 10_000),
    budget=st.sampled_from([1, 130, 400, 4096]),
    chunk=st.sampled_from([7, 50, 4096]),
    share=st.booleans(),
    work_tokens=st.sampled_from([1, 200, 100_000]),
    room=st.sampled_from([1, 2]),
    order=st.randoms(use_true_random=False),
)
def test_over_the_wire_with_evictions(
    tiny: Callable[..., Path],
    direct: dict[str, Any],
    make_items: Any,
    check_scores: Any,
    seed: int,
    budget: int,
    chunk: int,
    share: bool,
    work_tokens: int,
    room: int,
    order: Any,
) -> None:
    items = [item for name in MODELS for item in make_items(name, seed=seed)]
    order.shuffle(items)

    async def run() -> dict[int, Any]:
        options = {"precision": "float32", "token_budget": budget, "chunk_tokens": chunk, "share_prefixes": share}
        sources = [HfTeacherSource(name, tiny(name), **options) for name in MODELS]
        sizes = {s.info.id: s.info.nbytes for s in sources}
        residency = Residency(sizes, room * max(sizes.values()), max_wait_s=0.05)
        server = await serve(Scheduler(sources, residency, limits=Limits(work_tokens=work_tokens)))
        async with AsyncScoringClient([f"127.0.0.1:{server.port}"]) as client:
            found = {index: outcome async for index, outcome in client.score(items)}
        await server.stop(0)
        return found

    for index, outcome in asyncio.run(run()).items():
        assert isinstance(outcome, Scores), outcome
        check_scores(direct[items[index].teacher], items[index], outcome, 384)


def test_weights_in_memory_do_not_follow_their_file(tiny: Callable[..., Path], make_items: Any, tmp_path: Path) -> None:
    """safetensors maps files into memory; someone who writes into one must not change a teacher that is loaded."""
    folder = shutil.copytree(tiny(), tmp_path / "model")
    teacher = HfTeacherSource("t", folder, precision="float32").load()
    items = make_items("t")
    before = teacher.score(items)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    with path.open("r+b") as file:  # the same file, its weights all changed
        file.seek(header)
        file.write((np.frombuffer(raw[header:], "<f4") * 1.5).tobytes())
    for ours, theirs in zip(teacher.score(items), before, strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


def test_nan_is_an_error_of_the_items_that_it_touches(
    tiny: Callable[..., Path], direct: dict[str, Any], check_scores: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][200] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    teacher = HfTeacherSource("t", folder, precision="float32").load()
    rng = np.random.default_rng(0)
    prompt = rng.integers(4, 100, 30).astype(np.int32)
    items = [
        ScoreItem(np.concatenate((prompt, rng.integers(4, 100, 20).astype(np.int32))), (30, 50), "t") for _ in "abcd"
    ]
    poisoned = items[2].token_ids.copy()
    poisoned[40] = 200
    items[2] = replace(items[2], token_ids=poisoned)
    for index, outcome in teacher.stream(items):
        if index == 2:
            assert isinstance(outcome, TeacherFailed)
        else:
            assert isinstance(outcome, Scores)
            check_scores(direct["llama"], items[index], outcome, 384)


def test_a_batch_that_runs_out_of_memory_is_tried_one_by_one(
    tiny: Callable[..., Path],
    direct: dict[str, Any],
    make_items: Any,
    check_scores: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = HfTeacherSource("t", tiny(), precision="float32").load()
    whole = teacher._forward

    def scarce(ids_NL: Any, past: Any) -> Any:
        if ids_NL.shape[0] > 1 or past is not None:
            raise torch.OutOfMemoryError("no memory")
        return whole(ids_NL, past)

    monkeypatch.setattr(teacher, "_forward", scarce)
    items = make_items("t")
    for item, scores in zip(items, teacher.score(items), strict=True):
        check_scores(direct["llama"], item, scores, 384)


def test_frozen_teachers_do_not_follow_their_folder(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "student")
    frozen = freeze(folder, tmp_path / "kept")
    before = HfTeacherSource("self", frozen, precision="float32")
    shutil.copytree(tiny(seed=1), folder, dirs_exist_ok=True)
    before.load()
    assert freeze(folder, tmp_path / "kept") != frozen
    shutil.copytree(tiny(), folder, dirs_exist_ok=True)
    assert freeze(folder, tmp_path / "kept") == frozen, "found again"


def test_memory_is_counted_from_the_headers(tiny: Callable[..., Path]) -> None:
    model = HfTeacherSource("t", tiny(), precision="float32").load()._model
    expected = sum(p.numel() for p in model.parameters())
    assert loaded_bytes(tiny(), "float32") == 4 * expected
    assert loaded_bytes(tiny(), "bfloat16") == 2 * expected


def test_heads_over_the_wire_rebuild_scores(tiny: Callable[..., Path], make_items: Any) -> None:
    async def run() -> Any:
        source = HfTeacherSource("t", tiny(), precision="bfloat16")
        server = await serve(Scheduler([source], Residency({"t": source.info.nbytes}, source.info.nbytes)))
        async with AsyncScoringClient([f"127.0.0.1:{server.port}"]) as client:
            found = [outcome async for _, outcome in client.score(make_items("t")[:1])]
            head = await client.head("t")
        capped = HfTeacherSource("g", tiny("gemma2"), precision="float32")
        other = await serve(Scheduler([capped], Residency({"g": capped.info.nbytes}, capped.info.nbytes)))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{other.port}") as channel:
            from scoring.v1 import scoring_pb2 as pb
            from scoring.v1 import scoring_pb2_grpc as pb_grpc

            call = pb_grpc.TeacherScoringServiceStub(channel).GetTeacherHead(pb.GetTeacherHeadRequest(teacher="g"))  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError, match="capped"):
                async for _ in call:
                    pass
        await server.stop(0)
        await other.stop(0)
        return found[0], head

    scores, head = asyncio.run(run())
    item = make_items("t")[0]
    hidden = torch.from_numpy(scores.hidden_states.view(np.int16)).view(torch.bfloat16).float()
    logits = hidden @ head.tensor().float().T / item.temperature
    tokens = torch.from_numpy(item.token_ids[slice(*item.span)].astype(np.int64))
    rebuilt = torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(rebuilt, scores.logprobs, atol=1e-4)
