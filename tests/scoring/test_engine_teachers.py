"""Teachers in a process of their own: the suite that the real engines pass, over the plainest engine, and its faults.

The real ones are tested in their environments (tests_vllm, tests_sglang).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout_wal.errors import ProvenanceError
from rollout_wal.testing.engine_suite import module_at
from scoring.config import build, read_config
from scoring.errors import BadConfiguration, BadRequest, ScoreProvenanceMismatch, TeacherFailed
from scoring.items import Scores
from scoring.teachers.engine.rows import Ask, Rows
from scoring.teachers.engine.source import EngineTeacherSource, kv_bytes_per_token
from scoring.teachers.hf import loaded_bytes
from scoring.teachers.sglang import SglangTeacherSource
from scoring.teachers.vllm import VllmTeacherSource

HERE = Path(__file__).parent


# Under their own names: the engine's process finds them by `sys.path`.
suite, plain = (module_at(HERE / f"{name}.py", name) for name in ("engine_suite", "plain_engine"))
folder, direct, teacher = suite.folder, suite.direct, suite.teacher
test_scores_equal_a_direct_forward = suite.test_scores_equal_a_direct_forward
test_hidden_states_and_head_rebuild_the_scores = suite.test_hidden_states_and_head_rebuild_the_scores
test_who_does_not_read_on_leaves_nothing_behind = suite.test_who_does_not_read_on_leaves_nothing_behind
test_killed_in_mid_work_it_is_started_again = suite.test_killed_in_mid_work_it_is_started_again


@pytest.fixture(scope="module", autouse=True)
def _path() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture(scope="module")
def make_source(_path: None) -> Callable[..., EngineTeacherSource]:
    def make(name: str, folder: Path, **options: Any) -> EngineTeacherSource:
        made: EngineTeacherSource = plain.PlainEngineSource(name, folder, **options)
        return made

    return make


def test_an_item_that_kills_the_engine_fails_alone(
    make_source: Any, folder: Path, direct: Any, check_scores: Any
) -> None:
    options = {"precision": "float32", "engine_args": {"die_on": 299}}
    teacher = make_source("t", folder, **options).load()
    items = [suite.small_item(seed) for seed in range(6)]
    for item in items:
        item.token_ids[item.token_ids == 299] = 5
    items[3].token_ids[10] = 299
    found = dict(teacher.stream(items))
    assert sorted(found) == list(range(6))
    assert isinstance(found[3], TeacherFailed)
    assert "died" in str(found[3])
    for i in (0, 1, 2, 4, 5):
        assert isinstance(found[i], Scores), found[i]
        check_scores(direct, items[i], found[i], suite.VOCABULARY)
    for item in items[:3]:
        item.token_ids[10] = 299
    starts: list[int] = []
    teacher._start = _counted(teacher._start, starts)
    failed = dict(teacher.stream(items))
    assert sorted(failed) == list(range(6))
    assert all(isinstance(failed[i], TeacherFailed) for i in range(4))
    assert len(starts) == 2  # and not one for each
    teacher.close()


def _counted(start: Callable[[], Any], starts: list[int]) -> Callable[[], Any]:
    def counted() -> Any:
        starts.append(1)
        return start()

    return counted


@pytest.mark.parametrize(
    ("engine_args", "error", "says"),
    [
        ({"fail": "no such kernel"}, TeacherFailed, "no such kernel"),
        ({"describe": {"device": "cuda"}}, ScoreProvenanceMismatch, "'cuda'"),
        ({"describe": {"rollout_wal": "0.0.1"}}, ScoreProvenanceMismatch, "0.0.1"),
        ({"describe": {"logits": 100}}, ScoreProvenanceMismatch, "100"),
    ],
)
def test_an_engine_that_is_not_what_it_should_be_is_not_used(
    make_source: Any, folder: Path, engine_args: Any, error: type[Exception], says: str
) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(error, match=says):
        make_source("t", folder, precision="float32", engine_args=engine_args).load()
    assert not {child for child in psutil.Process().children() if child not in before}


def test_an_interpreter_that_is_not_there(make_source: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherFailed, match="cannot be started"):
        make_source("t", folder, precision="float32", python=tmp_path / "python").load()


def test_a_checkpoint_that_has_changed_is_not_started_again(
    make_source: Any, folder: Path, direct: Any, check_scores: Any, tmp_path: Path
) -> None:
    """What the engine holds stays right; once it is dead, other weights do not take its place."""
    copy = shutil.copytree(folder, tmp_path / "model")
    teacher = make_source("t", copy, precision="float32").load()
    weights = load_file(copy / "model.safetensors")
    save_file({name: 1.5 * w for name, w in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    item = suite.small_item(0)
    check_scores(direct, item, teacher.score([item])[0], suite.VOCABULARY)
    os.kill(teacher.pid, signal.SIGKILL)
    with pytest.raises(ProvenanceError, match="checkpoint of teacher"):
        teacher.score([item])
    teacher.close()


def test_capped_logits_are_scored_and_their_head_is_not_given_out(
    make_source: Any, tiny: Callable[..., Path], make_items: Any, check_scores: Any
) -> None:
    from transformers import AutoModelForCausalLM

    teacher = make_source("t", tiny("gemma2"), precision="float32").load()
    model = AutoModelForCausalLM.from_pretrained(tiny("gemma2"), dtype=torch.float32)
    assert model.config.final_logit_softcapping
    items = make_items("t")
    for item, scores in zip(items, teacher.score(items), strict=True):
        check_scores(model, item, scores, 384)
    with pytest.raises(BadRequest, match="no linear map"):
        teacher.head()
    teacher.close()


def test_rows_that_an_engine_skips_are_not_made_up() -> None:
    ask = Ask(3, np.arange(5, dtype="<i8").tobytes())
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        return logits[hidden[:, 0].long()]

    rows = Rows(ask, 10)
    rows.take(4, torch.arange(4.0)[:, None], logits_of)
    assert rows.outcome() == {"again": True}
    rows = Rows(ask, 10)
    rows.take(0, torch.arange(5.0)[:, None], logits_of)
    assert "2 of 5" in rows.outcome()["error"]
    rows.take(2, torch.arange(2.0, 8.0)[:, None], logits_of)  # again from before, after a preemption
    found = np.frombuffer(rows.outcome()["arrays"]["logprobs"], "<f4")
    expected = torch.log_softmax(logits, -1)[torch.arange(3, 8), torch.arange(5)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_memory_counts_weights_and_kv(folder: Path) -> None:
    weights, per_token = loaded_bytes(folder, "float32"), 2 * 2 * 2 * 32 * 4  # layers, K and V, heads, width, bytes
    source = VllmTeacherSource("t", folder, precision="float32", token_budget=100, max_context=200)
    assert source.info.max_context == 200
    assert source.info.nbytes == weights + per_token * (200 + 100 + 512)
    source = VllmTeacherSource("t", folder, precision="float32", kv_cache_bytes=per_token * 700)
    assert (source.info.max_context, source.info.nbytes) == (188, weights + per_token * 700)
    assert SglangTeacherSource("t", folder, precision="float32").info.max_context == 512 - 6
    with pytest.raises(BadConfiguration, match="holds 10 tokens"):
        VllmTeacherSource("t", folder, precision="float32", kv_cache_bytes=per_token * 10)

    class Latent:
        num_hidden_layers, kv_lora_rank, qk_rope_head_dim = 3, 512, 64

    assert kv_bytes_per_token(Latent, 2) == 3 * 576 * 2


def test_scores_name_their_engine(folder: Path) -> None:
    """bfloat16 of one engine is not bit for bit that of another: neither cache nor client mixes them."""
    found = {kind("t", folder).info.provenance for kind in (VllmTeacherSource, SglangTeacherSource)}
    assert {p.precision for p in found} == {"vllm-bfloat16", "sglang-bfloat16"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"engine": "tgi"}, "teachers.t.engine"),
        ({"kv_cache_bytes": "1GiB"}, "teachers.t.kv_cache_bytes.*engine: hf"),
        ({"engine": "vllm", "chunk_tokens": 64}, "teachers.t.chunk_tokens.*engine: vllm"),
        ({"engine": "vllm", "precision": "mxfp4"}, "mxfp4"),
        ({"engine": "sglang", "engine_args": {"tp_size": 2}}, "engine_args.tp_size"),
        ({"engine": "vllm", "engine_args": {"max_model_len": 2}}, "engine_args.max_model_len"),
        ({"engine": "vllm", "engine_args": [1]}, "teachers.t.engine_args"),
    ],
)
def test_what_is_wrong_with_an_engine_in_a_configuration_is_named(
    folder: Path, more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(BadConfiguration, match=says):
        build(read_config(suite.write(tmp_path, {"t": {"model": str(folder), **more}})))


def test_engines_in_a_configuration(folder: Path, tmp_path: Path) -> None:
    entry = {
        "model": str(folder),
        "engine": "vllm",
        "precision": "float32",
        "kv_cache_bytes": "2MiB",
        "max_context": 100,
        "python": "engine/bin/python",
        "device": "cuda:1",
        "engine_args": {"tensor_parallel_size": 2},
    }
    scheduler = build(read_config(suite.write(tmp_path, {"t": entry})))
    source = scheduler.sources["t"]
    assert isinstance(source, VllmTeacherSource)
    assert (source.kv_cache_bytes, source.info.max_context) == (2 << 20, 100)
    assert source.python == tmp_path / "engine/bin/python"
    assert source.engine_args == {"tensor_parallel_size": 2}
    assert not {"vllm", "sglang"} & {name.partition(".")[0] for name in sys.modules}
