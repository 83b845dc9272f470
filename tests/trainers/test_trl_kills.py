"""The real TRL trainer, killed between any two of its steps, ends where the uninterrupted one ends: bit for bit."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("trl", reason="needs the extra 'trl'")

from rollout_wal.dataset import open_dataset
from rollout_wal.testing.tiny_models import make_tiny_model

#: One of each moment, late enough that something is there to be lost, and twice in a row.
DEATHS = [
    ("generated", 1),
    ("stepped", 3),
    ("before state", 1),
    ("before commit", 1),
    ("before consume", 1),
    ("committed", 2),  # in the second epoch
    ("stepped", 1),
]


FOUR_STEPS: dict[str, Any] = {"num_iterations": 2, "steps_per_generation": 4, "steps": 6}
BEHIND: dict[str, Any] = {"save_steps": 3, "kwargs": {"max_staleness": 0}}


def live(folder: Path, **options: Any) -> int:
    """One life of the training process; its exit status."""
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("trl_process.py")
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run(
            [sys.executable, str(script), str(folder), json.dumps(options)],
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=False,
        )
    if done.returncode not in (0, -signal.SIGKILL):
        print((folder / "output.txt").read_text()[-4000:])
    return done.returncode


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "final" / "model.safetensors")


def check(killed: Path, reference: Path, atol: float) -> None:
    done = json.loads((killed / "done.json").read_text())
    assert done["holds"]
    expected = weights(reference)
    found = weights(killed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=atol, err_msg=name)
    # Each rollout was used by the same step, once, with the same reward, and sampled under the same policy version.
    rows, wanted = (
        [
            (r["sample"], r["reward"], json.loads(r["extras"])["optimizer_step"], r["policy_versions"])
            for r in open_dataset(folder / "archive").metadata().to_pylist()
        ]
        for folder in (killed, reference)
    )
    assert max(Counter(key for key, *_ in rows).values()) == 1
    assert sorted(rows) == sorted(wanted)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("options", "deaths", "atol"),
    [
        ({}, DEATHS, 0.0),
        # Checkpoints in the middle of a generation batch: the old policy's log-probabilities then come from the log
        # instead of a second forward, and differ by rounding.
        (FOUR_STEPS, [("stepped", 6), ("before commit", 2)], 1e-6),
        # Then they are the old policy of the loss alone.
        (FOUR_STEPS | {"config": {"vllm_importance_sampling_correction": False}}, [("stepped", 6)], 1e-6),
        # The log is ahead of the checkpoint. What it has is not stale, and goes on under the weights it began with.
        (BEHIND, [("sampling", 5), ("before generate", 3)], 0.0),
    ],
    ids=[
        "one step per generation",
        "four steps per generation",
        "four steps per generation without correction",
        "checkpoints behind the log",
    ],
)
def test_killed_anywhere_it_ends_where_it_would_have(
    tmp_path: Path, options: dict[str, Any], deaths: list[tuple[str, int]], atol: float
) -> None:
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert live(reference, **options) == 0
    for death in deaths:
        kills = 0 if death[0] == "sampling" else 2  # that one watches the worker's steps, and so must find one alive
        assert live(killed, die_at=death, worker_kills=kills, **options) == -signal.SIGKILL, death
    assert live(killed, worker_kills=2, **options) == 0
    check(killed, reference, atol)
    assert json.loads((killed / "done.json").read_text())["deaths"] > 0


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[str]:
    """A scoring server of a teacher with the student's tokenizer: host:port. One item a forward, so that its answers do
    not depend on which of them met."""
    pytest.importorskip("grpc", reason="needs the extra 'scoring'")
    from scoring.residency import Residency
    from scoring.scheduler import Scheduler
    from scoring.server import ServerOptions, serve
    from scoring.teachers.hf import HfTeacherSource

    folder = make_tiny_model(tmp_path / "teacher", mean_length=12.0, seed=1)
    shutil.copy(make_tiny_model(tmp_path / "student", mean_length=12.0) / "tokenizer.json", folder)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    source = HfTeacherSource("t", folder, precision="float32", token_budget=1)

    async def start() -> Any:
        return await serve(Scheduler([source], Residency({"t": source.info.nbytes}, 1 << 30)), ServerOptions())

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    yield f"127.0.0.1:{server.port}"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_distillation_killed_anywhere_ends_where_it_would_have(tmp_path: Path, teacher: str) -> None:
    options: dict[str, Any] = {"scorer": teacher, "kwargs": {"objective": "full_vocabulary"}}
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert live(reference, **options) == 0
    for death in [("generated", 2), ("before commit", 2), ("stepped", 3)]:
        assert live(killed, die_at=death, worker_kills=1, **options) == -signal.SIGKILL, death
    assert live(killed, worker_kills=1, **options) == 0
    check(killed, reference, 0.0)
    rows = open_dataset(killed / "archive").metadata().to_pylist()
    assert {tuple(row["teachers"]) for row in rows} == {("t",)}
