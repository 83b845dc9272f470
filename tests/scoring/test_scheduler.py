"""What is accepted is answered once and computed once; what nobody waits for is not computed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoring.cache import ScoreCache
from scoring.errors import (
    BadRequest,
    DeadlinePassed,
    MessageTooLarge,
    Overloaded,
    SchedulerFailed,
    ScoreProvenanceMismatch,
    TeacherFailed,
)
from scoring.heads import HeadStore
from scoring.items import ScoreItem, Scores, Wanted
from scoring.residency import Residency
from scoring.scheduler import Limits, Scheduler
from scoring.testing import PlainSource, expected_logprobs, plain_item


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def with_scheduler(
    sources: list[PlainSource],
    work: Callable[[Scheduler], Coroutine[Any, Any, None]],
    *,
    memory: int = 1000,
    **options: Any,
) -> None:
    async def run() -> None:
        residency = Residency({s.info.id: s.info.nbytes for s in sources}, memory, **options.pop("residency", {}))
        scheduler = Scheduler(sources, residency, **options)
        scheduler.start()
        try:
            await work(scheduler)
        finally:
            for source in sources:
                source.gate.set()
            await scheduler.stop()

    asyncio.run(run())


def check(item: ScoreItem, scores: Scores) -> None:
    scores.check_against(item)
    np.testing.assert_array_equal(scores.logprobs, expected_logprobs(item))


def test_identical_items_in_flight_are_computed_once(tmp_path: Path) -> None:
    source = PlainSource("a")
    source.gate.clear()
    item = plain_item(1)
    # The same span and context, in a rollout that goes on afterwards: the same computation, another checksum.
    longer = replace(item, token_ids=np.concatenate((item.token_ids, item.token_ids)))

    async def work(scheduler: Scheduler) -> None:
        asked = [asyncio.create_task(scheduler.score(i)) for i in (item, longer, item, plain_item(2))]
        await until(lambda: scheduler.counters.accepted_items == 4)
        assert scheduler.queued_tokens == 24
        gone = asyncio.create_task(scheduler.score(item))
        await asyncio.sleep(0.01)
        gone.cancel()
        source.gate.set()
        for i, scores in zip((item, longer, item), await asyncio.gather(*asked)):
            check(i, scores)
        assert len(source.scored) == 2
        assert scheduler.counters.coalesced_items == 3
        assert scheduler.queued_tokens == 0
        # And once on disk, not even once.
        await until(lambda: any(tmp_path.glob("??/*")))
        await asyncio.sleep(0.05)
        again = await scheduler.score(longer)
        assert again.from_cache
        check(longer, again)
        assert len(source.scored) == 2

    with_scheduler([source], work, cache=ScoreCache(tmp_path))


def test_scores_of_another_in_the_cache_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file may be whole and still not be the answer: a bug of an earlier version, somebody's copy."""
    source, cache = PlainSource("a"), ScoreCache(tmp_path)
    item, other = plain_item(1), plain_item(2)

    async def work(scheduler: Scheduler) -> None:
        theirs = await scheduler.score(other)
        cache.put(replace(theirs, request_key=item.key(source.info.provenance)))
        with caplog.at_level(logging.CRITICAL, "scoring.answers"):
            check(item, await scheduler.score(item))
        assert scheduler.counters.cached_items == 0

    with_scheduler([source], work, cache=cache)


def test_a_broken_scheduler_is_noticed_by_everyone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(scheduler: Scheduler) -> None:
        running = asyncio.create_task(scheduler.score(plain_item(1)))
        await until(lambda: scheduler.busy is not None)
        queued = asyncio.create_task(scheduler.score(plain_item(2)))
        await asyncio.sleep(0.02)

        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(scheduler.residency, "plan", broken)
        assert scheduler.healthy()
        source.gate.set()
        assert isinstance(await running, Scores), "it was computed before the defect"
        with pytest.raises(SchedulerFailed, match="a defect"):
            await queued
        assert scheduler.crashed.is_set()
        assert not scheduler.healthy()
        with pytest.raises(SchedulerFailed, match="nothing is accepted"):
            await scheduler.score(plain_item(3))
        assert scheduler.queued_tokens == 0

    with caplog.at_level(logging.CRITICAL + 1):
        with_scheduler([source], work)


def test_deadlines_and_cancelled_work_cost_no_computation() -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(scheduler: Scheduler) -> None:
        first = asyncio.create_task(scheduler.score(plain_item(0)))
        await until(lambda: scheduler.busy is not None)
        late = asyncio.create_task(scheduler.score(plain_item(1, deadline_s=0.01)))
        patient = asyncio.create_task(scheduler.score(plain_item(2, deadline_s=60.0)))
        gone = asyncio.create_task(scheduler.score(plain_item(3)))
        # Somebody waits for the same item longer than the other.
        hasty = asyncio.create_task(scheduler.score(plain_item(4, deadline_s=0.01)))
        lasting = asyncio.create_task(scheduler.score(plain_item(4)))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.01)
        assert scheduler.queued_tokens == 4 * 12, "what was cancelled is not queued any more"
        source.gate.set()
        for task in (late, hasty):
            with pytest.raises(DeadlinePassed):
                await task
        check(plain_item(2), await patient)
        check(plain_item(4), await lasting)
        await first
        assert len(source.scored) == 3
        assert scheduler.counters.deadline_passed == 2
        assert scheduler.counters.cancelled == 1

    with_scheduler([source], work)


def test_within_a_unit_too_what_nobody_wants_any_more_is_left_out() -> None:
    source = PlainSource("a")

    async def work(scheduler: Scheduler) -> None:
        await scheduler.score(plain_item(9))
        source.gate.clear()
        tasks = [asyncio.create_task(scheduler.score(plain_item(i))) for i in range(3)]
        await until(lambda: scheduler.busy is not None and not scheduler.waiting())
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        source.gate.set()
        await tasks[0]
        await tasks[2]
        assert len(source.scored) == 3

    with_scheduler([source], work)


def test_too_much_is_refused_with_a_time_to_come_back_and_too_large_for_good() -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(scheduler: Scheduler) -> None:
        accepted = [asyncio.create_task(scheduler.score(plain_item(i))) for i in range(4)]
        await until(lambda: scheduler.queued_tokens == 48)
        with pytest.raises(Overloaded, match="queued") as refused:
            await scheduler.score(plain_item(9))
        assert 0 < refused.value.retry_after_s <= 60
        with pytest.raises(MessageTooLarge):
            await scheduler.score(plain_item(9, length=31))
        with pytest.raises(MessageTooLarge):
            await scheduler.score(plain_item(9, wanted=Wanted(top_k=900)))
        source.gate.set()
        await asyncio.gather(*accepted)
        check(plain_item(9), await scheduler.score(plain_item(9)))

    limits = Limits(max_queued_tokens=48, max_item_tokens=30, max_item_result_bytes=4000)
    with_scheduler([source], work, limits=limits)


def test_an_item_larger_than_the_queue_is_taken_when_nothing_else_is() -> None:
    async def work(scheduler: Scheduler) -> None:
        check(plain_item(1), await scheduler.score(plain_item(1)))

    with_scheduler([PlainSource("a")], work, limits=Limits(max_queued_tokens=5))


def test_groups_are_taken_whole() -> None:
    source = PlainSource("a")
    prompt = np.arange(20, dtype=np.int32)
    group = [ScoreItem(np.concatenate((prompt, [i, i])).astype(np.int32), (20, 22), "a") for i in range(3)]
    others = [plain_item(i, length=22) for i in range(3)]

    async def work(scheduler: Scheduler) -> None:
        await scheduler.score(plain_item(9))
        source.gate.clear()
        tasks = [asyncio.create_task(scheduler.score(plain_item(8)))]
        await until(lambda: scheduler.busy is not None)
        mixed = [i for pair in zip(group, others) for i in pair]
        tasks += [asyncio.create_task(scheduler.score(i)) for i in mixed]
        await until(lambda: scheduler.counters.accepted_items == 8)
        source.gate.set()
        await asyncio.gather(*tasks)
        assert source.batches[2:] == [3, 3]
        assert {i.token_ids.tobytes() for i in source.scored[2:5]} == {i.token_ids.tobytes() for i in group}

    with_scheduler([source], work, limits=Limits(work_tokens=70, linger_s=0.0))


def test_a_teacher_that_fails_to_load_fails_its_items_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = PlainSource("bad", fail=OSError("no such disk")), PlainSource("good")

    async def work(scheduler: Scheduler) -> None:
        outcomes = await asyncio.gather(
            *(scheduler.score(plain_item(i, t)) for i in range(3) for t in ("bad", "good")), return_exceptions=True
        )
        for i, outcome in enumerate(outcomes):
            if i % 2:
                assert isinstance(outcome, Scores)
            else:
                assert isinstance(outcome, TeacherFailed)
                assert "no such disk" in str(outcome)
        assert set(scheduler.failures) == {"bad"}
        with pytest.raises(TeacherFailed):
            await scheduler.score(plain_item(5, "bad"))
        assert bad.loads == 1, "not tried again at once: others would be evicted for it"
        bad.fail = None
        await until(lambda: not scheduler.failures)
        check(plain_item(6, "bad"), await scheduler.score(plain_item(6, "bad")))

    with caplog.at_level(logging.CRITICAL):
        with_scheduler([bad, good], work)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda item, s: replace(s, logprobs=np.full(item.positions, np.nan, np.float32)), TeacherFailed),
        (lambda item, s: replace(s, logprobs=None), TeacherFailed),
        (lambda item, s: replace(s, scored_crc32c=1), ScoreProvenanceMismatch),
        (lambda item, s: replace(s, request_key="0" * 40), ScoreProvenanceMismatch),
        (lambda item, s: ValueError("out of memory"), TeacherFailed),
    ],
)
def test_what_is_no_score_is_never_given_out_or_kept(
    answer: Any, error: type[Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad_item = plain_item(1)
    source = PlainSource("a", answer=lambda i, s: answer(i, s) if i.token_ids[0] == bad_item.token_ids[0] else s)

    async def work(scheduler: Scheduler) -> None:
        outcomes = await asyncio.gather(
            scheduler.score(bad_item), scheduler.score(plain_item(2)), return_exceptions=True
        )
        assert isinstance(outcomes[0], error)
        assert isinstance(outcomes[1], Scores), "its company is not affected"

    with caplog.at_level(logging.CRITICAL):
        with_scheduler([source], work, cache=ScoreCache(tmp_path))
    assert len(list(tmp_path.glob("??/*"))) == 1


def test_a_teacher_that_forgets_an_item_is_found_out() -> None:
    class Forgetful(PlainSource):
        def load(self) -> Any:
            teacher: Any = super().load()
            whole = teacher.stream
            teacher.stream = lambda items, wanted: list(whole(items, wanted))[1:]
            return teacher

    async def work(scheduler: Scheduler) -> None:
        with pytest.raises(TeacherFailed, match="gave no answer"):
            await scheduler.score(plain_item(1))

    logging.disable(logging.ERROR)
    try:
        with_scheduler([Forgetful("a")], work)
    finally:
        logging.disable(logging.NOTSET)


def test_heads_are_loaded_within_the_memory_budget_and_kept_on_disk(tmp_path: Path) -> None:
    sources = [PlainSource(name, nbytes=6) for name in "abc"]

    async def work(scheduler: Scheduler) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, sum(source.alive for source in sources))
                assert scheduler.residency.used_bytes <= 12
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        heads = await asyncio.gather(*(scheduler.head(name) for name in "abcabc"))
        assert [source.loads for source in sources] == [1, 1, 1]
        for head in heads:
            assert np.frombuffer(b"".join(head.pieces()), "<f4").tolist() == list(range(80))
        await asyncio.gather(*(scheduler.score(plain_item(i, "ab"[i % 2])) for i in range(4)))
        loads = sum(source.loads for source in sources)
        await scheduler.head("c")
        assert sum(source.loads for source in sources) == loads, "read from disk"
        with pytest.raises(BadRequest):
            await scheduler.head("nobody")
        watching.cancel()
        assert most <= 2

    with_scheduler(sources, work, memory=12, heads=HeadStore(tmp_path))


def test_pinned_teachers_are_there_first_and_stay() -> None:
    sources = [PlainSource(name, nbytes=6) for name in "abcd"]

    async def work(scheduler: Scheduler) -> None:
        await until(lambda: "a" in scheduler.room.teachers)
        for i in range(9):
            await scheduler.score(plain_item(i, "bcd"[i % 3]))
            assert "a" in scheduler.room.teachers
        assert sources[0].loads == 1

    with_scheduler(sources, work, memory=12, residency={"pinned": ["a"]})


def test_the_next_teacher_is_loaded_while_another_works() -> None:
    a, b = PlainSource("a"), PlainSource("b")
    a.gate.clear()

    async def work(scheduler: Scheduler) -> None:
        first = asyncio.create_task(scheduler.score(plain_item(1, "a")))
        second = asyncio.create_task(scheduler.score(plain_item(1, "b")))
        await until(lambda: b.loads == 1)
        assert not first.done()
        a.gate.set()
        await first
        await second

    with_scheduler([a, b], work)


def test_stopping_leaves_nobody_waiting() -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def run() -> None:
        scheduler = Scheduler([source], Residency({"a": 1}, 1))
        scheduler.start()
        tasks = [asyncio.create_task(scheduler.score(plain_item(i))) for i in range(3)]
        await until(lambda: scheduler.busy is not None)
        stop = asyncio.create_task(scheduler.stop())
        await asyncio.sleep(0.02)
        source.gate.set()
        await stop
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, (Scores, SchedulerFailed)) for outcome in outcomes)

    asyncio.run(run())
