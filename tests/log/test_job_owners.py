"""RolloutWal: what its methods refuse, and what an owner may still do when the job has another by now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_wal.engine_log import EngineLog
from rollout_wal.errors import BadInput, LogFenced
from rollout_wal.params import SamplingParams
from rollout_wal.wal import RolloutWal


def open_job(path: Path, **options: Any) -> RolloutWal:
    return RolloutWal.open(path, segment_bytes=1 << 16, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda wal, r: wal.consumed([r], epoch=1.0, step=3),
        lambda wal, r: wal.consumed([r], epoch=0, step=True),
        lambda wal, r: wal.censor(r + 1, None),
        lambda wal, r: wal.declare_policy(2.0, "w"),
        lambda wal, r: wal.begin_cohort(7, "d", 1),
        lambda wal, r: wal.begin([1], SamplingParams(), seed=1, group=b"g"),
    ],
    ids=["epoch", "step", "reason", "version", "name", "group"],
)
def test_a_value_of_another_type_is_refused_and_the_job_opens_again(
    wrong: Callable[[RolloutWal, int], object], tmp_path: Path
) -> None:
    with open_job(tmp_path) as wal:
        cohort = wal.begin_cohort("c", "d", 2)
        r, _ = (wal.begin([1, 2], SamplingParams(), seed=i, cohort=cohort, index=i) for i in range(2))
        wal.declare_policy(0, "w")
        wal.censor(r, "x")
        wal.delivered([r])
        before, last = wal.balance(), wal.log.writer.last_lsn
        with pytest.raises(BadInput, match="cannot be logged"):
            wrong(wal, r)
        assert (wal.balance(), wal.log.writer.last_lsn) == (before, last)
    with open_job(tmp_path) as wal:
        assert wal.balance() == before


def sample(log: EngineLog, tokens: int) -> None:
    for token in range(tokens):
        log.append_step(
            np.zeros(1, np.uint16), np.full(1, token, np.uint32), np.zeros(1, np.uint8), np.zeros(1, np.float32)
        )
    log.wait_durable()


def successor(path: Path) -> tuple[RolloutWal, EngineLog, int]:
    """Another owner of the job, and five durable tokens of a rollout that it has begun, by an engine of its own."""
    wal = open_job(path, take_over=True)
    rollout = wal.begin([1, 2], SamplingParams(), seed=1)
    attempt = wal.attempt(rollout, "0")
    wal.wait_durable()
    engine = wal.engine_log("0")
    engine.bind(0, rollout, attempt.attempt, 0)
    sample(engine, 5)
    return wal, engine, rollout


@pytest.fixture
def stale(tmp_path: Path) -> RolloutWal:
    """The owner of a job whose engine has died: it is about to read that engine's log."""
    wal = open_job(tmp_path)
    wal.engine_log("0").close()
    return wal


def test_an_owner_that_was_paused_forgets_nothing_of_its_successors(
    stale: RolloutWal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked at the job's fence, sleeps while all this happens, and finds the engine's log free again."""
    real = EngineLog.open
    later: list[Any] = []

    def open_after(*args: Any, **options: Any) -> EngineLog:
        if not later:
            monkeypatch.undo()
            later.extend(successor(tmp_path))
            later[1].close()
        return real(*args, **options)

    monkeypatch.setattr(EngineLog, "open", open_after)
    with pytest.raises(LogFenced, match="took over"):
        stale.absorb("0")
    wal, _, rollout = later
    wal.absorb("0")
    assert len(wal.tokens(rollout)) == 5
    wal.close()
    with open_job(tmp_path) as wal:
        assert len(wal.tokens(rollout)) == 5


def test_an_owner_that_waits_for_an_engine_fences_none_of_its_successors(
    stale: RolloutWal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stale.log.fence.check
    later: list[Any] = []

    def check() -> None:
        real()
        if not later:
            later.extend(successor(tmp_path))

    monkeypatch.setattr(stale.log.fence, "check", check)
    with pytest.raises(LogFenced, match="took over"):
        stale.absorb("0")
    wal, engine, _ = later
    sample(engine, 1)
    engine.close()
    wal.close()
