"""From finished rollouts to the dataset: each once, whatever dies in between."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from rollout_wal.backend import RolloutBackend
from rollout_wal.backend.finished import FinishedRollout
from rollout_wal.dataset import DatasetWriter, Freshness, Masked, SegmentKind, extras_from_json, open_dataset
from rollout_wal.delivery import seal, to_sample
from rollout_wal.engines.base import EngineInfo, FinishReason
from rollout_wal.params import SamplingParams
from rollout_wal.stream import Stream
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.tokens import Tokens

SAMPLING = SamplingParams(max_tokens=60)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=25, seed=2)


class Crash(Exception):
    """Stands for the process ending right here."""


def test_a_crash_between_manifest_and_release_seals_nothing_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dataset"
    metadata = [{"domain": f"d{i}", "note": i} for i in range(len(PROMPTS))]

    def rollouts(backend: RolloutBackend):  # type: ignore[no-untyped-def]
        return backend.generate(PROMPTS, SAMPLING, group_size=3, seed=1, cohort="c", metadata=metadata)

    with RolloutBackend(model, tmp_path / "wal", slots=8, segment_bytes=1 << 20) as backend:
        with monkeypatch.context() as m:
            m.setattr(backend, "release", lambda ids: (_ for _ in ()).throw(Crash))
            with pytest.raises(Crash):
                seal(backend, rollouts(backend), folder, SAMPLING, batch=4)
        assert open_dataset(folder).num_samples == 4

    with RolloutBackend(model, tmp_path / "wal", slots=8, segment_bytes=1 << 20) as backend:
        done = seal(backend, rollouts(backend), folder, SAMPLING, batch=4)
        assert (done.rollouts, done.already) == (9, 4)
        assert backend.balance().released == 9
        assert list(rollouts(backend)) == []

    dataset = open_dataset(folder)
    table = dataset.metadata()
    assert sorted(table["sample"].to_pylist()) == sorted(f"c/{i}" for i in range(9))
    assert set(table["domain"].to_pylist()) == {"d0", "d1", "d2"}


def test_a_fenced_owner_commits_nothing(model: Path, tmp_path: Path) -> None:
    from rollout_wal.errors import LogFenced
    from rollout_wal.wal import RolloutWal

    folder = tmp_path / "dataset"
    backend = RolloutBackend(model, tmp_path / "wal", slots=8, segment_bytes=1 << 20).start()
    try:
        rollouts = list(backend.generate(PROMPTS, SAMPLING, seed=1))
        RolloutWal.open(tmp_path / "wal", segment_bytes=1 << 20, take_over=True).close()
        with pytest.raises(LogFenced, match="took over"):
            seal(backend, rollouts, folder, SAMPLING)
    finally:
        with contextlib.suppress(LogFenced):  # what was still pending in the job log may not be acknowledged either
            backend.close()
    assert open_dataset(folder).num_samples == 0


def test_a_sample_says_what_the_rollout_said(model: Path, tmp_path: Path) -> None:
    with RolloutBackend(model, tmp_path / "wal", slots=8, segment_bytes=1 << 20) as backend:
        rollout = next(iter(backend.generate(PROMPTS[:1], SAMPLING, seed=4)))
        sample = to_sample(rollout, backend.info, SAMPLING)
    assert sample.token_ids.tolist() == [*PROMPTS[0], *rollout.tokens.tolist()]
    assert sample.segment_kinds.tolist() == [SegmentKind.PROMPT] * 3 + [SegmentKind.SAMPLED] * len(rollout.tokens)
    assert isinstance(sample.logprobs, Masked)
    assert sample.logprobs.valid.tolist() == [False] * 3 + [True] * len(rollout.tokens)
    np.testing.assert_array_equal(sample.logprobs.values[3:], rollout.output.logprob.value_T)
    assert sum(n for _, n in sample.policy_runs) == len(rollout.tokens)


def _finished(parts: list[tuple[int, int | None]], **metadata: object) -> FinishedRollout:
    """Of parts (tokens, version), where None stands for what was observed."""
    tokens = []
    for count, version in parts:
        if version is None:
            tokens.append(Tokens.observed(np.arange(count, dtype=np.int32)))
        else:
            stream = Stream(1, 1, 0)
            stream.extend(np.arange(count, dtype=np.uint32), np.zeros(count, np.float32), None, version)
            tokens.append(Tokens.of_stream(stream))
    return FinishedRollout(
        id=1,
        key="c/0",
        cohort="c",
        index=0,
        group="c/0",
        prompt=np.array([1, 2], np.int32),
        output=Tokens.concat(tokens),
        finish_reason=FinishReason.EOS,
        censored=None,
        seed=3,
        interruptions=0,
        metadata=metadata,
    )


@pytest.mark.parametrize(
    ("parts", "runs"),
    [
        ([(10, 120), (30, None), (5, 120)], ((120, 45),)),
        ([(10, 119), (30, None), (5, 120), (2, None)], ((119, 40), (120, 7))),
        ([(3, None), (4, 7)], ((7, 7),)),
        ([(4, 0), (4, None), (1, 3)], ((0, 8), (3, 1))),
        ([], ()),
    ],
)
def test_what_a_tool_printed_has_the_version_of_its_turn(
    parts: list[tuple[int, int | None]], runs: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    info = EngineInfo(*["x"] * 6, vocab_size=100, max_context=100, eos_token_ids=(2,))
    sample = to_sample(_finished(parts, image=b"\0", steps={3: "three"}), info, SAMPLING)
    assert sample.policy_runs == runs
    DatasetWriter(tmp_path, writer_id="w").seal([sample])
    table = open_dataset(tmp_path).metadata()
    versions = [version for version, _ in runs]
    (row,) = table.to_pylist()
    assert row["policy_version_min"] == min(versions, default=None)
    newest = max(versions, default=0)
    for by in ("start", "tokens"):
        fresh = Freshness(current_version=newest, max_lag=newest - min(versions, default=0), by=by, min_fresh_share=1.0)
        assert fresh.keep(table).all(), "however much the tools printed"
    assert extras_from_json(row["extras"]) == {"image": b"\0", "steps": {3: "three"}}
