"""Scores equal a direct forward of the same model, however items are batched, chunked and shared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

import scoring.teachers.shared_prefix
from rollout_kernels.linear import MXFP4Linear
from rollout_kernels.model import quantize_model_
from rollout_kernels.mxfp4 import dequantize
from scoring.batching import plan
from scoring.errors import BadRequest, ScoreProvenanceMismatch, TeacherFailed
from scoring.items import ScoreItem
from scoring.teachers.hf import HfTeacherSource, SnapshotSource
from scoring.teachers.shared_prefix import CannotShare, SharedPrefix


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gemma2", "moe"])
@pytest.mark.parametrize(("budget", "chunk"), [(4096, 4096), (150, 4096), (400, 16), (1, 7)])
def test_scores_equal_a_direct_forward(
    tiny: Callable[..., Path], make_items: Any, check_scores: Any, architecture: str, budget: int, chunk: int
) -> None:
    folder = tiny(architecture)
    source = HfTeacherSource("t", folder, precision="float32", token_budget=budget, chunk_tokens=chunk)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    items = make_items("t")
    for item in items:
        source.info.check(item)
    for item, scores in zip(items, source.load().score(items), strict=True):
        check_scores(model, item, scores, source.info.vocabulary)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "moe", "mistral"])
@pytest.mark.parametrize("chunk", [4096, 50, 9, 1])
def test_rows_behind_a_shared_context_equal_a_direct_forward(
    tiny: Callable[..., Path], check_scores: Any, tmp_path: Path, architecture: str, chunk: int
) -> None:
    """Grouped queries and sliding windows; windows shorter and longer than the context; cut anywhere."""
    if architecture == "mistral":  # every layer has a window, longer than the chunks and shorter than the context
        from transformers import MistralConfig, MistralForCausalLM

        folder = shutil.copytree(tiny(), tmp_path / "mistral")
        torch.manual_seed(0)
        fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = MistralConfig(
            **fields, num_key_value_heads=1, vocab_size=384, max_position_embeddings=512, sliding_window=70
        )
        MistralForCausalLM(config).save_pretrained(folder)
    else:
        folder = tiny(architecture)
    source = HfTeacherSource("t", folder, precision="float32", chunk_tokens=chunk)
    teacher = source.load()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(0)
    for shared in (17, 101):
        prompt = rng.integers(4, 300, shared).astype(np.int32)
        items = [
            ScoreItem(np.concatenate((prompt, rng.integers(4, 300, n).astype(np.int32))), (shared, shared + n), "t")
            for n in (1, 40, 80, 13)
        ]
        for item, scores in zip(items, teacher.score(items), strict=True):
            check_scores(model, item, scores, source.info.vocabulary)
    assert teacher._continues, "none of them is to be copied"


def test_what_cannot_be_shared_is_copied(
    tiny: Callable[..., Path], make_items: Any, check_scores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft-capped attention from the start; a layer that goes round the shared context as soon as it does so."""
    assert not HfTeacherSource("t", tiny("gemma2"), precision="float32").load()._continues
    source = HfTeacherSource("t", tiny(), precision="float32")
    teacher, model = source.load(), AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    assert teacher._continues
    layer = teacher._model.model.layers[1].self_attn
    monkeypatch.setattr(layer, "layer_idx", 0)  # reads and writes what is another layer's
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(20)[None], past_key_values=cache)
    with pytest.raises(CannotShare):
        teacher._forward(torch.arange(8)[None], SharedPrefix(cache).rows(8))
    monkeypatch.undo()
    real = scoring.teachers.shared_prefix._attend
    calls = 0

    def capped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **options, softcap=30.0 if calls > 1 else None)

    monkeypatch.setattr(AttentionInterface, "_global_mapping", {**AttentionInterface._global_mapping})
    AttentionInterface.register("scoring_shared_prefix", capped)
    items = make_items("t")
    for item, scores in zip(items, teacher.score(items), strict=True):
        check_scores(model, item, scores, source.info.vocabulary)
    assert calls == 2
    assert not teacher._continues


def test_hidden_states_and_head_rebuild_the_scores(tiny: Callable[..., Path], make_items: Any) -> None:
    teacher = HfTeacherSource("t", tiny(), precision="float32").load()
    item = make_items("t")[0]
    (scores,) = teacher.score([item])
    hidden = torch.from_numpy(scores.hidden_states.view(np.int16)).view(torch.bfloat16).float()  # type: ignore[union-attr]
    rebuilt = torch.log_softmax(hidden @ teacher.head().T / item.temperature, -1)
    tokens = torch.from_numpy(item.token_ids[slice(*item.span)].astype(np.int64))
    np.testing.assert_allclose(rebuilt.gather(-1, tokens[:, None])[:, 0], scores.logprobs, atol=0.05)
    capped = HfTeacherSource("g", tiny("gemma2"), precision="float32")
    if getattr(AutoModelForCausalLM.from_pretrained(tiny("gemma2")).config, "final_logit_softcapping", None):
        with pytest.raises(BadRequest, match="capped"):
            capped.load().head()


def test_mxfp4_equals_the_dequantised_model_exactly(tiny: Callable[..., Path], make_items: Any) -> None:
    items = make_items("t")
    packed = HfTeacherSource("t", tiny(), precision="mxfp4-float32")
    scores = packed.load().score(items)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    quantize_model_(model)
    replaced = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, MXFP4Linear):
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = dequantize(module.packed, torch.float32)
            model.set_submodule(name, dense)
            replaced += 1
    assert replaced
    plain = SnapshotSource("t", model, tokenizer_folder=tiny())
    for ours, theirs in zip(scores, plain.load().score(items), strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
        np.testing.assert_array_equal(ours.top_logprobs, theirs.top_logprobs)
    dense = HfTeacherSource("t", tiny(), precision="float32").load().score(items)
    assert not np.array_equal(dense[0].logprobs, scores[0].logprobs), "packing must have changed something"


def test_a_snapshot_does_not_follow_its_student(tiny: Callable[..., Path], make_items: Any) -> None:
    student: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    snapshot = SnapshotSource("self", student, tokenizer_folder=tiny())
    items = make_items("self")
    before = snapshot.load().score(items)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.5)
    for ours, theirs in zip(snapshot.load().score(items), before, strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    later = SnapshotSource("self", student, tokenizer_folder=tiny())
    assert later.info.provenance.checkpoint != snapshot.info.provenance.checkpoint


def test_a_checkpoint_that_changes_on_disk_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "model")
    source = HfTeacherSource("t", folder, precision="float32")
    source.load()
    (folder / "config.json").touch()
    source.load()  # touched, not changed
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ScoreProvenanceMismatch, match=source.info.provenance.checkpoint):
        source.load()


def test_broken_teachers_fail_to_load(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherFailed, match="not finite"):
        HfTeacherSource("t", folder, precision="float32").load()
    folder = shutil.copytree(tiny(), tmp_path / "short")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherFailed, match="lack 1 tensors"):
        HfTeacherSource("t", folder, precision="float32").load()
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(TeacherFailed, match="cannot be loaded"):
        HfTeacherSource("t", folder, precision="float32").load()


def test_plans_hold_each_item_once_within_the_budget(make_items: Any) -> None:
    items = make_items("t")
    for budget in (1, 100, 500, 10_000):
        batches = plan(items, budget)
        assert sorted(i for b in batches for i in b.members) == list(range(len(items)))
        for batch in batches:
            assert len(batch.members) == 1 or batch.tokens <= budget
            for i, row in zip(batch.members, batch.rows):
                np.testing.assert_array_equal(np.concatenate((batch.prefix, row)), items[i].read_ids()[:-1])
    assert sum(len(b.prefix) > 0 for b in plan(items, 10_000)) == 2, "the two shared prompts, once each"


@pytest.mark.parametrize("precision", ["float32", "mxfp4"])
def test_a_closed_teacher_has_no_memory_left(tiny: Callable[..., Path], precision: str) -> None:
    """At once, with no collection of garbage, although its modules refer to themselves."""
    teacher = HfTeacherSource("t", tiny(), precision=precision).load()
    model = teacher._model
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(t.untyped_storage().nbytes() for t in tensors) > 1 << 16
    teacher.close()
    assert not any(t.untyped_storage().nbytes() for t in tensors)


def test_closing_a_snapshot_leaves_it_for_the_next_load(tiny: Callable[..., Path], make_items: Any) -> None:
    student: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    snapshot = SnapshotSource("self", student, tokenizer_folder=tiny())
    items = make_items("self")
    first = snapshot.load()
    before = first.score(items)
    first.close()
    for ours, theirs in zip(snapshot.load().score(items), before, strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
