"""What the backend remembers follows what is in flight or unused, however many rollouts a job has had."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from rollout_wal.backend import RolloutBackend
from rollout_wal.engines.base import FinishReason
from rollout_wal.job_state import JobState
from rollout_wal.params import SamplingParams
from rollout_wal.records import Attempt, Begin, Censor, Cohort, Consumed, Delivered, Finish, Release


def tables(b: RolloutBackend) -> dict[str, int]:
    """The size of everything that has an entry for a rollout, an attempt or a caller."""
    c = b._running()

    def look() -> dict[str, int]:
        state, workers = c.wal.state, c.fleet.workers
        for worker in workers:
            worker.mirror.finish()
        return {
            "rollouts": len(state.rollouts),
            "in flight": len(state.in_flight),
            "members": sum(len(x.members) + len(x.unused) + len(x.running) for x in state.cohorts.values()),
            "released members": sum(len(x.released_members) for x in state.cohorts.values()),
            "streams": len(c.wal.streams),
            "mirrored": sum(len(w.mirror.streams) + len(w.mirror._attempts) for w in workers),
            "running": sum(len(w.running) for w in workers),
            "waiting": c._scheduler.waiting + len(c._scheduler._pending),
            "died at": len(c._scheduler._died_at),
            "quarantine": len(c._quarantine.waiting) + len(c._quarantine._died_alone) + len(c._quarantine._alone),
            "endings": len(c.endings),
            "over": len(c._over),
            "recovered": len(c._recovered),
            "outlets": len(c.handover),
            "commands": len(c._commands._queue),
        }

    return c.call(look)


def test_many_short_cohorts_leave_nothing_behind(
    backend: Callable[..., RolloutBackend], prompts: Any, until: Callable[..., None]
) -> None:
    plain, stops = SamplingParams(max_tokens=6), SamplingParams(max_tokens=6, stop=("1", "a", "e"))
    with backend(workers=1, segment_bytes=1 << 16) as b:
        for step in range(40):
            iterator = b.generate(prompts, stops if step % 2 else plain, seed=step)
            if step % 5 == 0:
                for rollout in list(b._running().call(lambda: list(b._running().wal.state.in_flight)))[:3]:
                    b.abort(rollout)
            if step % 10 == 3:
                b.kill_worker("0", signal.SIGKILL)  # some of them are over by then, and are found so in the log
            ids = [r.id for r in iterator]
            if step % 3:
                b.consumed(ids, epoch=0, step=step)
            else:
                b.release(ids)
            if step % 10 == 3:
                until(lambda: len(b.worker_steps()) == 1)
        del iterator
        until(lambda: not any(tables(b).values()))
        assert len(b.cohorts()) == 40
        assert b.balance().holds


def test_the_indexes_say_what_a_walk_says() -> None:
    """Members, unused and running ones, after any records, and after a checkpoint of them was read back."""
    rng = random.Random(5)
    state = JobState()
    prompt = np.asarray([1, 2], np.int32)

    def check(s: JobState) -> None:
        assert list(s.in_flight) == [r.id for r in s.rollouts.values() if r.finish is None and r.censor is None]
        for number, c in s.cohorts.items():
            mine = [r for r in s.rollouts.values() if r.begin.cohort == number]
            assert list(c.members) == [r.id for r in mine]
            assert list(c.unused) == [r.id for r in mine if r.consumed is None]
            assert list(c.running) == [r.id for r in mine if r.finish is None and r.censor is None]
            assert c.used == c.released + sum(r.consumed is not None for r in mine)
            assert s.cohort_named(c.record.name) is c
        assert s.cohort_named("none") is None
        assert s.next_cohort == max(s.cohorts, default=0) + 1

    for _ in range(600):
        ids = list(state.rollouts)
        some = np.asarray([rng.choice(ids)] if ids else [0], np.int64)
        one = int(some[0])
        match rng.randrange(8):
            case 0:
                number = state.next_cohort
                state.change(Cohort(number, f"c{number}", "d", 4))
            case 1 | 2:
                cohort = rng.randrange(state.next_cohort)  # 0: of no cohort
                state.change(Begin(state.next_rollout, prompt, {}, 1, "position", cohort, rng.randrange(4), "", {}, {}))
            case 3:
                state.change(Attempt(one, 1, 0, "0", "start"))
            case 4:
                r = state.rollouts.get(one)
                state.change(Finish(one, r.attempt if r else 0, 0, int(FinishReason.EOS)))
            case 5:
                state.change(Censor(one, "abort", 0))
            case 6:
                state.change(Delivered(some))
                state.change(Consumed(some, 0, 0))
            case 7:
                state.change(Release(some))
        check(state)
    again = JobState()
    for record in state.checkpoint():
        again.apply(int(record.TYPE), record.encode())
    check(again)
    assert list(again.rollouts) == list(state.rollouts)
    assert {n: c.used for n, c in again.cohorts.items()} == {n: c.used for n, c in state.cohorts.items()}
