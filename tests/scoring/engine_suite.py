"""What a teacher in any engine must pass. Test files take it in by path and say how their source is made.

The model is unkind: its vocabulary is padded with logits that would win, and one token's embedding is NaN.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rollout_wal.testing.tiny_models import make_tiny_model
from scoring.client import AsyncScoringClient, ScoringClient
from scoring.config import build, read_config
from scoring.errors import TeacherFailed
from scoring.items import ScoreItem, Scores, Wanted
from scoring.server import serve
from scoring.teachers.engine.source import EngineTeacher, EngineTeacherSource

VOCABULARY, PADDED, NAN = 384, 450, 350
BUDGET = 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unkind(make_tiny_model(tmp_path_factory.mktemp("models") / "teacher", max_context=512, head_dim=32))


def unkind(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.randn(PADDED - VOCABULARY, weights[name].shape[1], generator=generator)
        weights[name] = torch.cat((weights[name], 3.0 * more))
    weights["model.embed_tokens.weight"][NAN] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": PADDED}))
    return folder


@pytest.fixture(scope="session")
def direct(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def teacher(make_source: Callable[..., EngineTeacherSource], folder: Path) -> Iterator[EngineTeacher]:
    teacher = make_source("t", folder, precision="float32", token_budget=BUDGET).load()
    yield teacher
    teacher.close()


def poisoned(item: ScoreItem) -> ScoreItem:
    """The same with the token whose embedding is NaN in the middle of its span."""
    tokens = item.token_ids.copy()
    tokens[(item.span[0] + item.span[1]) // 2] = NAN
    return replace(item, token_ids=tokens)


def test_scores_equal_a_direct_forward(teacher: EngineTeacher, direct: Any, make_items: Any, check_scores: Any) -> None:
    """In pieces, from the prefix cache, in any company; padding masked; a NaN is an error of its item alone."""
    assert teacher.info.vocabulary == VOCABULARY
    items = [item for seed in range(2) for item in make_items("t", seed=seed)]
    items.insert(5, poisoned(items[4]))
    for seed in range(3):  # the second time, the engine has seen all of it
        order = list(range(len(items)))
        random.Random(seed).shuffle(order)
        found = {order[i]: outcome for i, outcome in teacher.stream([items[i] for i in order])}
        assert sorted(found) == sorted(order)
        failed = found.pop(5)
        assert isinstance(failed, TeacherFailed)
        assert "NaN" in str(failed)
        for i, scores in found.items():
            assert isinstance(scores, Scores), scores
            check_scores(direct, items[i], scores, VOCABULARY)
            assert scores.provenance == teacher.info.provenance


def test_hidden_states_and_head_rebuild_the_scores(teacher: EngineTeacher, direct: Any, make_items: Any) -> None:
    head = teacher.head()
    assert head.dtype == torch.float32
    assert torch.equal(head, direct.lm_head.weight.detach()[:VOCABULARY])
    for item in make_items("t", seed=7)[:4]:
        (scores,) = teacher.score([item])
        hidden = torch.from_numpy(scores.hidden_states.view(np.int16).copy()).view(torch.bfloat16).float()
        logprobs = torch.log_softmax(hidden @ head.T / item.temperature, -1)
        chosen = logprobs[torch.arange(item.positions), torch.from_numpy(item.token_ids[slice(*item.span)]).long()]
        keep = scores.valid
        np.testing.assert_allclose(chosen.numpy()[keep], scores.logprobs[keep], atol=0.05)  # bfloat16


def test_who_does_not_read_on_leaves_nothing_behind(
    teacher: EngineTeacher, direct: Any, make_items: Any, check_scores: Any
) -> None:
    items = make_items("t", seed=3)
    stream = teacher.stream(items, lambda i: i != 2)
    assert next(stream)[0] != 2
    stream.close()
    (scores,) = teacher.score(items[:1])
    check_scores(direct, items[0], scores, VOCABULARY)
    assert 2 not in dict(teacher.stream(items, lambda i: i != 2))


def test_killed_in_mid_work_it_is_started_again(
    teacher: EngineTeacher, direct: Any, make_items: Any, check_scores: Any
) -> None:
    items = [item for seed in range(4) for item in make_items("t", seed=10 + seed)]
    first = teacher.pid
    found: dict[int, Any] = {}
    for i, outcome in teacher.stream(items):
        found[i] = outcome
        if len(found) == 3:
            os.kill(teacher.pid, signal.SIGKILL)
    assert teacher.pid != first
    assert not psutil.pid_exists(first)
    assert sorted(found) == list(range(len(items)))
    for i, scores in found.items():
        assert isinstance(scores, Scores), scores
        check_scores(direct, items[i], scores, VOCABULARY)


def test_through_a_server_with_evictions(
    engine_entry: dict[str, Any], folder: Path, direct: Any, make_items: Any, check_scores: Any, tmp_path: Path
) -> None:
    """The engine has to go for another teacher, is really gone then, and comes back."""
    common = {"model": str(folder), "precision": "float32", "token_budget": BUDGET}
    path = write(tmp_path, {"t": {**common, **engine_entry}, "plain": common}, memory=0)

    async def run() -> dict[str, Any]:
        scheduler = build(read_config(path))
        server = await serve(scheduler)
        found = {}
        async with AsyncScoringClient([f"127.0.0.1:{server.port}"]) as client:
            for seed, name in enumerate(("t", "plain", "t")):
                items = make_items(name, seed=20 + seed)
                found[f"{name}{seed}"] = items, {i: o async for i, o in client.score(items)}
                if name == "t":
                    engine = scheduler.room.teachers["t"]
                    assert isinstance(engine, EngineTeacher)
                    assert psutil.pid_exists(engine.pid)
                else:
                    assert "t" not in scheduler.room.teachers
                    assert not psutil.pid_exists(engine.pid)
        assert scheduler.counters.loads == {"t": 2, "plain": 1}
        assert await server.drain(30.0)
        assert not psutil.pid_exists(engine.pid)
        return found

    for name, (items, outcomes) in asyncio.run(run()).items():
        assert sorted(outcomes) == list(range(len(items)))
        for i, scores in outcomes.items():
            assert isinstance(scores, Scores), (name, scores)
            check_scores(direct, items[i], scores, VOCABULARY)


def test_it_dies_with_its_server(
    engine_entry: dict[str, Any], folder: Path, direct: Any, make_items: Any, check_scores: Any, tmp_path: Path
) -> None:
    """`rollout-wal serve-teachers` is SIGKILLed while the engine works."""
    entry = {"model": str(folder), "precision": "float32", "token_budget": BUDGET, **engine_entry}
    path, port_file = write(tmp_path, {"t": entry}), tmp_path / "port"
    command = "from scoring.serve_command import serve_teachers; serve_teachers()"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", command, "--port-file", str(port_file), str(path)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    try:
        wait_for(port_file.exists, lambda: server.poll() is None)
        items = make_items("t", seed=30)
        with ScoringClient([f"127.0.0.1:{int(port_file.read_text())}"]) as client:
            for i, scores in client.score(items):
                assert isinstance(scores, Scores), scores
                check_scores(direct, items[i], scores, VOCABULARY)
        engines = psutil.Process(server.pid).children(recursive=True)
        assert engines
    finally:
        server.kill()
        server.wait()
    wait_for(lambda: not any(alive(engine) for engine in engines))


def wait_for(condition: Callable[[], bool], meanwhile: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert meanwhile()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """An orphan's zombie may wait for ever where nobody reaps them; its memory is free."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def write(folder: Path, teachers: dict[str, Any], memory: int = 1 << 30) -> Path:
    """A configuration; memory 0: for the largest teacher alone."""
    path = folder / "teachers.yaml"
    settings = {"listen": "127.0.0.1:0", "memory": memory or 1 << 40, "threads": 1, "teachers": teachers}
    path.write_text(yaml.safe_dump(settings))
    if not memory:
        sizes = [source.info.nbytes for source in build(read_config(path)).sources.values()]
        path.write_text(yaml.safe_dump({**settings, "memory": max(sizes)}))
    return path


def small_item(seed: int, length: int = 20, **fields: Any) -> ScoreItem:
    tokens = np.random.default_rng(seed).integers(4, 300, length).astype(np.int32)
    return ScoreItem(tokens, (4, length), "t", wanted=Wanted(), **fields)
