"""What the records of a log add up to."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rollout_wal import engine_state
from rollout_wal.engine_log import EngineLog
from rollout_wal.engine_state import EngineState
from rollout_wal.engines.base import FinishReason
from rollout_wal.errors import BadInput, LogCorruptInput, LogTooNew
from rollout_wal.job_state import JobState, Status
from rollout_wal.log.policy import SyncPolicy
from rollout_wal.log.segment import Frame
from rollout_wal.records import (
    Attempt,
    Begin,
    Carried,
    Carry,
    Censor,
    Checkpoint,
    CheckpointEnd,
    Cohort,
    Consumed,
    Delivered,
    Finish,
    Observe,
    Record,
    RecordType,
    Release,
)
from rollout_wal.testing.disk import Disk
from rollout_wal.testing.workloads import EngineModel, attempts_of, describe


def engine_log(disk: Disk, segment_bytes: int = 2048) -> EngineLog:
    return EngineLog.open(disk.mount(), segment_bytes=segment_bytes, prepare_ahead=False, policy=SyncPolicy("step"))


def step(log: EngineLog, rows: list[tuple[int, int, int]], **options: object) -> int:
    return log.append_step(
        np.asarray([r[0] for r in rows], np.uint16),
        np.asarray([r[1] for r in rows], np.uint32),
        np.asarray([r[2] for r in rows], np.uint8),
        np.asarray([-r[1] / 8 for r in rows], np.float32),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("batch", [1, 7, 40, 1 << 18])
@pytest.mark.parametrize("seed", range(3))
def test_any_history_adds_up_to_what_the_plain_model_says(
    seed: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of any size; requests in any order; slots that change hands; several widths."""
    monkeypatch.setattr(engine_state, "_BATCH_TOKENS", batch)
    rng = random.Random(seed)
    disk, model = Disk(), EngineModel()
    log = engine_log(disk, 1 << 16)
    bound: dict[int, int] = {}
    rollout = 0
    for _ in range(150):
        dice = rng.random()
        if dice < 0.2 or not bound:
            rollout += 1
            slot = rng.randrange(6)
            bound[slot] = rollout
            model.say(log.bind(slot, rollout, 1, 5), "bind", slot, rollout, 1, 5)
        elif dice < 0.24:
            gone = {rng.randrange(1, rollout + 1)}
            model.say(log.forget(gone), "forget", gone)
        elif dice < 0.28:
            model.say(log.policy(rollout, "d"), "policy", rollout)
        else:
            slots = rng.sample(sorted(bound), rng.randrange(1, len(bound) + 1))
            if rng.random() < 0.5:
                slots = sorted(bound)
            rows = [(s, rng.randrange(4096), int(rng.random() < 0.05)) for s in slots]
            model.say(step(log, rows), "step", [(s, t, -t / 8, f) for s, t, f in rows])
    log.wait_durable()
    log.close()
    assert attempts_of(engine_log(disk).state) == model.states[-1][1]


def test_missing_logprobs_stay_missing_through_a_checkpoint() -> None:
    disk = Disk()
    log = engine_log(disk, 512)
    log.bind(0, 1, 1, 0)
    step(log, [(0, 8, 0)])
    log.append_step(np.zeros(1, np.uint16), np.full(1, 16, np.uint32), np.zeros(1, np.uint8))
    for _ in range(20):
        log.bind(1, 99, 1, 0)
        log.wait_durable()
    log.forget([99])
    assert log.clean(min_segments=2) > 0
    log.close()
    stream = engine_log(disk).state.streams[1, 1]
    assert stream.token_T.tolist() == [8, 16]
    assert not stream.logprob_T.valid_T.all(), "a checkpoint may mask more than was missing, and never less"
    assert not stream.logprob_T.valid_T[1]


def test_several_tokens_per_row_and_named_columns_survive_recovery_and_cleaning() -> None:
    disk = Disk()
    log = engine_log(disk, 600)
    log.bind(0, 1, 1, 0)
    log.bind(1, 2, 1, 0)
    step(log, [(0, 1, 0), (1, 2, 0)])
    routed = np.arange(12, dtype=np.uint8).reshape(4, 3)
    log.append_step(
        np.asarray([0, 1], np.uint16),
        np.asarray([10, 11, 12, 20], np.uint32),
        np.asarray([0, 2], np.uint8),
        np.zeros(4, np.float32),
        count_R=np.asarray([3, 1], np.uint16),
        named={16: routed},
    )
    log.wait_durable()
    for _ in range(2):
        again = EngineState()
        for frame in log.log.read():
            again.apply(frame)
        first, second = again.finish().streams[1, 1], again.streams[2, 1]
        assert (first.token_T.tolist(), second.token_T.tolist()) == ([1, 10, 11, 12], [2, 20])
        assert (first.finish, second.finish) == (FinishReason.RUNNING, FinishReason.STOP_TOKEN)
        assert [(at, c.tolist()) for at, c in first.named[16]] == [(1, routed[:3].tolist())]
        assert [(at, c.tolist()) for at, c in second.named[16]] == [(1, routed[3:].tolist())]
        for _ in range(20):
            log.bind(5, 99, 1, 0)
            log.wait_durable()
        log.forget([99])
        log.clean(min_segments=2)


@pytest.mark.parametrize("width", [0, 240])
def test_what_is_mostly_live_is_not_copied_at_each_release(width: int) -> None:
    """Nor where the columns of a token take many times what the token does."""
    log = engine_log(disk := Disk(), 1 << 15)
    for slot in range(16):
        log.bind(slot, slot + 1, 1, 0)
    columns = {16: np.zeros((16, width), np.uint8), 17: np.zeros((16, width), np.uint8)} if width else None
    for token in range(150 if width else 1500):
        step(log, [(slot, token, 0) for slot in range(16)], named=columns)
    log.wait_durable()
    written = log.log.writer.bytes_written
    dropped = 0
    for rollout in range(1, 9):
        log.forget([rollout])
        dropped += log.clean()
        log.wait_durable()
    assert not dropped, "no more than half of it was released"
    assert log.log.writer.bytes_written < written + 1000
    log.forget(range(9, 16))
    log.close()
    assert engine_log(disk, 1 << 15).clean() > 0


def test_a_finish_that_the_engine_ran_past_is_kept() -> None:
    log = engine_log(disk := Disk())
    log.bind(0, 1, 1, 0)
    for token, finish in ((1, 0), (2, 1), (3, 0)):
        step(log, [(0, token, finish)])
    log.wait_durable()
    log.close()
    assert engine_log(disk).state.streams[1, 1].finish is FinishReason.EOS


def test_a_slot_that_changed_hands_belongs_to_one_attempt_only() -> None:
    log = engine_log(disk := Disk())
    log.bind(0, 1, 1, 0)
    log.bind(0, 2, 1, 0)
    log.wait_durable()
    log.close()
    state = engine_log(disk).state
    assert [s.slot for s in state.streams.values()] == [-1, 0]


def test_rows_of_a_slot_that_nobody_is_bound_to_are_nobodys() -> None:
    log = engine_log(disk := Disk())
    log.bind(0, 1, 1, 0)
    step(log, [(0, 1, 0), (7, 2, 0)])
    log.forget([1])
    step(log, [(0, 3, 0)])
    log.wait_durable()
    log.close()
    assert engine_log(disk).state.streams == {}


def test_a_slot_out_of_range_is_refused() -> None:
    with pytest.raises(BadInput, match="slot 65536"):
        engine_log(Disk()).bind(1 << 16, 1, 1, 0)


def test_held_frames_are_shown_only_when_durable() -> None:
    from collections import deque

    log = engine_log(Disk())
    log.held = deque()
    log.bind(0, 1, 1, 0)
    step(log, [(0, 5, 0)])
    assert log.take_durable() == []
    log.wait_durable()
    assert [f.type for f in log.take_durable()] == [RecordType.BIND, RecordType.STEP]
    assert log.take_durable() == []


@pytest.mark.parametrize(
    "change",
    [
        {"version_at": np.asarray([1])},
        {"versions": np.asarray([1, 2])},
        {"logprobs": np.zeros(1, np.float32)},
        {"finish": 77},
    ],
)
def test_a_carry_whose_columns_do_not_agree_is_refused(change: dict[str, object]) -> None:
    good = {
        "rollout": 1,
        "attempt": 1,
        "start": 0,
        "slot": 0,
        "finish": 0,
        "tokens": np.arange(2, dtype=np.uint32),
        "logprobs": np.zeros(2, np.float32),
        "sampling_logprobs": np.zeros(0, np.float32),
        "version_at": np.asarray([0]),
        "versions": np.asarray([1]),
    }

    def carry(values: dict[str, object]) -> EngineState:
        state = EngineState()
        for record in (Checkpoint({"live": [[1, 1, 0, 0]]}), Carry(**values)):  # type: ignore[arg-type]
            state.apply(Frame(int(record.TYPE), 0, 1, 0, 0, memoryview(record.encode())))
        return state.finish()

    assert carry(good).streams[1, 1].token_T.tolist() == [0, 1]
    with pytest.raises(LogCorruptInput):
        carry({**good, **change})


@pytest.mark.parametrize("state", [{}, {"live": 3}, {"live": [[1]]}, {"live": [], "policy": [1]}, {"live": None}])
def test_a_checkpoint_that_is_none_is_refused(state: dict[str, object]) -> None:
    record = Checkpoint(state)
    with pytest.raises(LogCorruptInput):
        EngineState().apply(Frame(int(record.TYPE), 0, 1, 0, 0, memoryview(record.encode())))
    with pytest.raises(LogCorruptInput):
        JobState().apply(int(record.TYPE), record.encode())


# -- the job's state --------------------------------------------------------------------------------------------------


def ids(*rollouts: int) -> np.ndarray:
    return np.asarray(rollouts, np.int64)


def begun(state: JobState, cohort: int, size: int) -> list[int]:
    state.change(Cohort(cohort, f"c{cohort}", "d", size))
    first = state.next_rollout
    for i in range(size):
        state.change(Begin(first + i, np.arange(2, dtype=np.int32), {}, i, cohort=cohort, index=i))
    return list(range(first, first + size))


def again(records: list[Record]) -> JobState:
    state = JobState()
    for record in records:
        state.apply(int(record.TYPE), record.encode())
    return state


def test_a_rollouts_life() -> None:
    state = JobState()
    one, two = begun(state, 1, 2)
    state.change(Attempt(one, 1, 0, "0"))
    state.change(Attempt(one, 2, 5, "1", "resume"))
    state.change(Finish(one, 1, 5, 1))
    assert state.rollouts[one].status is Status.IN_FLIGHT, "a superseded attempt finishes nothing"
    state.change(Finish(one, 2, 7, 1))
    state.change(Finish(one, 2, 9, 1))
    assert (state.rollouts[one].finish.count, state.rollouts[one].interruptions) == (7, 1)  # type: ignore[union-attr]
    state.change(Censor(two, "deadline", 0))
    state.change(Delivered(ids(one, two, 99)))
    state.change(Delivered(ids(one)))
    cohort = state.cohorts[1]
    assert (cohort.begun, cohort.delivered, dict(cohort.censored), cohort.in_flight) == (2, 1, {"deadline": 1}, 0)
    state.change(Consumed(ids(one), 0, 3))
    state.change(Consumed(ids(one), 0, 4))
    assert state.rollouts[one].consumed == (0, 3)
    state.change(Release(ids(one, two)))
    assert (cohort.released, cohort.complete, cohort.released_members) == (2, True, set())


def test_nothing_changes_a_rollout_that_has_ended() -> None:
    """An Attempt that came too late must not make a checkpoint drop the Finish."""
    state = JobState()
    (one,) = begun(state, 1, 1)
    state.change(Attempt(one, 1, 0, "0"))
    state.change(Finish(one, 1, 3, 1))
    before = describe(state)
    for late in (Attempt(one, 2, 3, "0"), Observe(one, 3, np.arange(3, dtype=np.int32)), Censor(one, "abort", 1)):
        state.change(late)
    state.change(Cohort(1, "c1", "other", 9))
    assert describe(state) == before
    assert describe(again(state.checkpoint())) == before


def test_a_checkpoint_says_everything_again() -> None:
    rng = random.Random(0)
    state = JobState()
    rollouts = [r for cohort in (1, 2, 3) for r in begun(state, cohort, 6)]
    for r in rollouts:
        state.change(Attempt(r, 1, 0, "0"))
        if rng.random() < 0.7:
            state.change(Finish(r, 1, 2, 1) if rng.random() < 0.6 else Censor(r, rng.choice("ab"), 1))
            if rng.random() < 0.7:
                state.change(Delivered(ids(r)))
                state.change(Consumed(ids(r), 0, 1))
                if rng.random() < 0.5:
                    state.change(Release(ids(r)))
    assert describe(again(state.checkpoint())) == describe(state)


def test_a_checkpoint_is_linear_in_the_rollouts() -> None:
    """Cohorts times rollouts would be four million looks here."""

    class Counting(dict):  # type: ignore[type-arg]
        looks = 0

        def values(self):  # type: ignore[no-untyped-def]
            for value in super().values():
                Counting.looks += 1
                yield value

    state = JobState()
    for cohort in range(1, 2001):
        begun(state, cohort, 1)
    state.rollouts = Counting(state.rollouts)
    state.checkpoint()
    assert Counting.looks <= 4 * 2000


def test_a_checkpoint_that_a_crash_cut_short_says_nothing() -> None:
    state = JobState()
    begun(state, 1, 3)
    records = state.checkpoint()
    torn = again([Cohort(7, "c", "d", 1), *records[:-2], Cohort(8, "e", "d", 1)])
    assert sorted(torn.cohorts) == [7, 8]
    # and neither does what follows it, until a whole one comes
    whole = again([Cohort(7, "c", "d", 1), *records[:-2], Cohort(8, "e", "d", 1), records[-1]])
    assert sorted(whole.cohorts) == [7, 8]


def test_a_checkpoint_of_another_count_is_refused() -> None:
    state = JobState()
    begun(state, 1, 3)
    records = state.checkpoint()
    with pytest.raises(LogCorruptInput, match="a checkpoint of 3 records holds 2"):
        again([*records[:-2], records[-1]])


def test_unknown_types_are_refused_also_inside_a_checkpoint() -> None:
    with pytest.raises(LogTooNew):
        JobState().apply(99, b"")
    JobState().apply(99, b"", 1)
    with pytest.raises(LogTooNew):
        again([Checkpoint({"cohorts": [], "next_rollout": 1, "engine": None, "policy": None}), Carried(99, b"")])
    assert CheckpointEnd(0).TYPE == RecordType.CHECKPOINT_END
