"""Engine, scorer and learner joined: bounds, freshness, replay; and every one of them killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_wal.backend import RolloutBackend
from rollout_wal.dataset import open_dataset
from rollout_wal.dataset.collate import collate_padded
from rollout_wal.params import SamplingParams
from scoring.client import ClientOptions
from scoring.errors import BadRequest, Unreachable
from scoring.pipeline import Pipeline, PipelineOptions, PromptBatch
from scoring.pipeline.metrics import PipelineMetrics
from scoring.routing import DomainRouter
from scoring.teachers.hf import HfTeacherSource

ROUTER = DomainRouter({}, default="t-math")
QUICK = ClientOptions(attempts=3, backoff_s=0.01, backoff_max_s=0.05, patience_s=0.5)
JOB = Path(__file__).with_name("pipeline_job.py")


def prompts(count: int) -> Callable[[int], PromptBatch | None]:
    def batch(number: int) -> PromptBatch | None:
        rng = np.random.default_rng(number)
        return PromptBatch([rng.integers(4, 200, 6).tolist() for _ in range(2)]) if number < count else None

    return batch


@pytest.fixture
def sources(kin: Callable[[int], Path]) -> list[HfTeacherSource]:
    return [HfTeacherSource(name, kin(seed), precision="float32") for name, seed in (("t-math", 1), ("t-code", 2))]


@pytest.fixture(scope="module")
def backend(kin: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutBackend]:
    """One for all tests that kill none; each names its cohorts after its own folder."""
    wal = tmp_path_factory.mktemp("job") / "wal"
    with RolloutBackend(kin(0), wal, workers=1, slots=8, segment_bytes=1 << 18) as running:
        yield running


def pipeline(backend: RolloutBackend, folder: Path, target: str, count: int, **more: Any) -> Pipeline:
    more["options"] = {
        "group_size": 2,
        "seal_s": 0.02,
        "commit_s": 0.02,
        "name": str(folder),
        **more.get("options", {}),
    }
    more["options"] = PipelineOptions(**more["options"])
    return Pipeline(
        backend,
        folder,
        [target],
        prompts(count),
        SamplingParams(max_tokens=40),
        router=ROUTER,
        client=QUICK,
        **more,
    )


def test_batches_come_whole_in_order_with_scores_and_metrics(
    backend: RolloutBackend, host: Any, sources: Any, tmp_path: Path
) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    with pipeline(backend, tmp_path / "d", host(sources).target, 4) as pipe:
        PipelineMetrics(pipe, registry=registry)
        numbers = []
        for batch in pipe:
            numbers.append(batch.number)
            assert (len(batch.samples), batch.submitted, batch.left_out) == (4, 4, {})
            assert batch.teachers == ["t-math"]
            padded = collate_padded(batch.samples, ("logprobs", "teacher.t-math.logprobs"))
            assert (padded.masks["teacher.t-math.logprobs"] == padded.loss_mask).all()
            pipe.trained(batch, batch.number)
            pipe.commit()
            with pytest.raises(BadRequest, match="not with the learner"):
                pipe.trained(batch, batch.number)
        stats = pipe.stats()
        text = generate_latest(registry).decode()
    assert numbers == [0, 1, 2, 3]
    assert (stats.consumed, stats.scored, stats.queued, stats.score_coverage) == (16, 0, 0, 1.0)
    assert "rollout_wal_pipeline_score_coverage 1.0" in text
    assert "rollout_wal_pipeline_consumed_total 16.0" in text
    assert 'rollout_wal_pipeline_bound{buffer="scored"} 512.0' in text
    assert backend.balance().holds


def test_a_slow_learner_holds_everything_back(backend: RolloutBackend, host: Any, sources: Any, tmp_path: Path) -> None:
    bounds = {"generation": 4, "scoring": 4, "scored": 4}
    with pipeline(backend, tmp_path / "d", host(sources).target, 30, options=bounds) as pipe:
        batches = iter(pipe)
        first = next(batches)
        before = None
        while before != (stats := pipe.stats()).begun or stats.scored < 4:  # until nothing moves any more
            before = stats.begun
            time.sleep(0.5)
        # A batch with the learner, the bounds, and at most one batch more in each.
        assert stats.begun <= 4 + 3 * (4 + 4)
        assert stats.scored <= 8
        assert stats.queued + stats.scoring <= 8
        assert stats.generating + stats.finished <= 8
        pipe.trained(first, 0)
        pipe.commit()
        assert next(batches).number == 1
        assert pipe.stats().held_back_s > 0


def test_stale_rollouts_are_dropped_by_their_first_token_and_counted_by_length(
    backend: RolloutBackend, host: Any, sources: Any, kin: Any, tmp_path: Path
) -> None:
    with pipeline(backend, tmp_path / "d", host(sources).target, 4, options={"max_lag": 0, "generation": 4}) as pipe:
        batches = iter(pipe)
        first = next(batches)
        while pipe.stats().scored < 4:
            time.sleep(0.05)
        pipe.update_weights(kin(0), 1)
        pipe.trained(first, 0)
        pipe.commit()
        rest = list(batches)
        stats = pipe.stats()
        removed = pipe.removed_by_length()
    assert stats.stale >= 4
    assert stats.consumed + stats.stale + sum(len(b.samples) for b in rest) == 16
    for batch in rest:
        assert all(sample.metadata["policy_version_start"] == 1 for sample in batch.samples)
    assert sum(removed["removed"].to_pylist()) == stats.stale
    assert open_dataset(tmp_path / "d").num_samples == 16  # the dataset keeps what the learner does not get


def test_replay_has_a_limit_that_another_pipeline_keeps(
    backend: RolloutBackend, host: Any, sources: Any, tmp_path: Path
) -> None:
    target = host(sources).target
    uses: list[tuple[int, int]] = []
    state: dict[str, Any] = {}
    for stop_after in (3, 99):
        with pipeline(backend, tmp_path / "d", target, 3, options={"replay": 2}, state=state) as pipe:
            for count, batch in enumerate(pipe, 1):
                uses.append((batch.number, batch.use))
                state = json.loads(json.dumps(pipe.trained(batch, count)))
                pipe.commit()
                if count == stop_after:
                    break
    assert uses == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]


def test_what_no_teacher_can_score_is_left_out_and_named(
    backend: RolloutBackend, host: Any, sources: Any, tmp_path: Path
) -> None:
    with Pipeline(
        backend,
        tmp_path / "d",
        [host(sources).target],
        prompts(2),
        SamplingParams(max_tokens=10),
        router=DomainRouter({}, default="nobody"),
        client=QUICK,
        options=PipelineOptions(seal_s=0.02, commit_s=0.02, name=str(tmp_path)),
    ) as pipe:
        assert list(pipe) == []
        assert pipe.stats().unscorable == 4
        assert "'nobody'" in pipe.failures[0]


def test_servers_that_stay_away_stop_the_pipeline_and_lose_nothing(
    backend: RolloutBackend, host: Any, sources: Any, tmp_path: Path
) -> None:
    gone = host(sources)
    gone.stop()
    with pytest.raises(Unreachable), pipeline(backend, tmp_path / "d", gone.target, 2) as pipe:
        list(pipe)
    with pipeline(backend, tmp_path / "d", host(sources).target, 2) as pipe:
        keys = [sample.key for batch in pipe for sample in batch.samples]
    assert len(set(keys)) == len(keys) == 8


def run(config: dict[str, Any], **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOB), json.dumps({**config, **more})]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def steps(folder: Path) -> Any:
    path = folder / "checkpoint.json"
    return json.loads(path.read_text())["steps"] if path.exists() else []


def flat(folder: Path) -> dict[str, list[int]]:
    taken = [pair for _, batch in steps(folder) for pair in batch]
    assert len({key for key, _ in taken}) == len(taken), "something was trained on twice"
    return dict(taken)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_learner_killed_around_its_checkpoint_trains_on_everything_once(
    kin: Any, host: Any, sources: Any, tmp_path: Path
) -> None:
    """Before the checkpoint, and between it and the log's record of it."""
    config = {"model": str(kin(0)), "targets": [host(sources).target], "path": str(tmp_path)}
    for number, point in enumerate(("trained", "saved")):
        died = run(config, die_at=[point, number])
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert len(steps(tmp_path)) == (number if point == "trained" else number + 1)
    done = run(config)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["holds"]
    assert [number for number, _ in steps(tmp_path)] == list(range(6))
    assert len(flat(tmp_path)) == 24


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_killed_while_it_runs_loses_nothing_and_repeats_nothing(
    kin: Any, sources: Any, tmp_path: Path
) -> None:
    """SIGKILL to the engine's worker, the scoring server and the learner, while all of them have work to do."""
    folder, whole = tmp_path / "job", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    served = _Served(kin, tmp_path)
    config = {"model": str(kin(0)), "targets": [f"127.0.0.1:{served.port}"], "path": str(folder), "batches": 8}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(JOB), json.dumps({**config, "step_s": 0.2})]
        with (tmp_path / "stderr").open("a") as log:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, text=True)

    job = start()
    try:
        for victim in ("worker", "server", "learner", "server", "worker"):
            before, deadline = len(steps(folder)), time.monotonic() + 100
            while len(steps(folder)) == before and job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if victim == "worker":
                for pid in json.loads((folder / "pids.json").read_text()).values():
                    _kill(pid)
            elif victim == "server":
                served.restart()
            else:
                job.kill()
                job.wait()
                job = start()
        assert job.wait(120) == 0, (tmp_path / "stderr").read_text()
        done = run(config, path=str(whole))
        assert done.returncode == 0, done.stderr
    finally:
        job.kill()
        job.wait()
        served.stop()
    assert [number for number, _ in steps(folder)] == list(range(8))
    assert flat(folder) == flat(whole)


class _Served:
    """A scoring server in a process of its own, on a port that it keeps."""

    def __init__(self, kin: Any, folder: Path) -> None:
        self._config, self._port_file = folder / "teachers.yaml", folder / "port"
        self._log, self._kin, self.port = folder / "server.log", kin, 0
        self._start()

    def _start(self) -> None:
        teachers = {n: {"model": str(self._kin(s)), "precision": "float32"} for n, s in (("t-math", 1), ("t-code", 2))}
        # JSON is YAML.
        self._config.write_text(
            json.dumps({"listen": f"127.0.0.1:{self.port}", "memory": "1GiB", "teachers": teachers})
        )
        self._port_file.unlink(missing_ok=True)
        call = "from scoring.serve_command import serve_teachers; serve_teachers()"
        command = [sys.executable, "-c", call, str(self._config), "--port-file", str(self._port_file)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(command, stderr=log)
        deadline = time.monotonic() + 120
        while not self._port_file.exists():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.port = int(self._port_file.read_text())

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
