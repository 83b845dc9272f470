"""Accepted items wait here; one teacher at a time works on them while another is being loaded.

Everything but loading, computing and the disk runs on one event loop; each of those has threads of its own. If the
scheduler itself breaks, every waiter gets the error, and nothing is accepted any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rollout_wal.errors import RolloutWalError

from .answers import answer_for, broken, checked, from_cache, stopped, unknown_failure
from .cache import ScoreCache
from .counters import Counters
from .errors import BadRequest, DeadlinePassed, MessageTooLarge, Overloaded, problem
from .heads import HeadStore, StoredHead
from .items import ScoreItem, Scores, check_provenance
from .jobs import Job, Queues, Waiter
from .limits import Limits
from .residency import Residency, Waiting
from .teacher_room import TeacherRoom
from .teachers.base import Teacher, TeacherSource

__all__ = ["Limits", "Scheduler"]

log = logging.getLogger(__name__)

_NOTHING = np.zeros(0, np.int32)


class Scheduler:
    """Scores items under teachers of which only some fit in memory.

    Args:
        sources: the teachers.
        residency: over the same teachers.
        cache: scores that were computed before; None: none are kept.
        heads: heads that were given out before; None: kept until the scheduler stops.
        limits: what to accept.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        sources: Sequence[TeacherSource],
        residency: Residency,
        *,
        cache: ScoreCache | None = None,
        heads: HeadStore | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sources: Mapping[str, TeacherSource] = {s.info.id: s for s in sources}
        self.residency, self.limits, self.counters = residency, limits or Limits(), Counters()
        self.room = TeacherRoom(self.sources, residency, self.counters, clock, self._loaded)
        self.crashed = asyncio.Event()
        self.busy: tuple[str, float] | None = None
        """The teacher that works, and since when."""
        self.queued_tokens = 0
        """Of all accepted jobs that are not finished."""
        self._cache, self._heads, self._clock = cache, heads or HeadStore(), clock
        self._queues = Queues()
        self._jobs: dict[str, Job] = {}
        """All that are queued or running, by key: whoever wants the same waits for the same."""
        self._wake = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, "scoring-compute")
        self._disk = ThreadPoolExecutor(2, "scoring-disk")
        self._disk_backlog = 0
        self._crash: BaseException | None = None
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._unit_task: asyncio.Task[None] | None = None

    @property
    def failures(self) -> dict[str, str]:
        """Teachers that cannot be loaded at present, each with the reason."""
        return self.room.failing()

    def waiting(self) -> dict[str, Waiting]:
        """What is queued, by teacher. Any thread may ask."""
        return self._queues.waiting()

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Stop at once; whoever still waits gets SchedulerFailed. To lose nothing, wait for `idle` first."""
        self._stopping = True
        tasks = [task for task in (self._task, self._unit_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_all(stopped())
        for pool in (self._compute, self._disk):
            await asyncio.get_running_loop().run_in_executor(None, pool.shutdown)
        await self.room.close()
        self._heads.close()

    async def idle(self) -> None:
        """Return when everything that was accepted is answered."""
        while self._jobs:
            await asyncio.sleep(0.01)

    def healthy(self) -> bool:
        """Whether work goes on."""
        stalled = self.busy is not None and self._clock() - self.busy[1] > self.limits.unit_stall_s
        return self._crash is None and not stalled

    def teacher_for(self, item: ScoreItem) -> TeacherSource:
        """By the name that the item gives, or by its domain. Raises BadRequest."""
        if item.teacher:
            found = [self.sources[item.teacher]] if item.teacher in self.sources else []
        else:
            found = [s for s in self.sources.values() if item.domain in s.info.domains]
        if len(found) != 1:
            raise BadRequest(
                problem(
                    f"{len(found)} teachers answer to teacher={item.teacher!r}, domain={item.domain!r}",
                    consequence="Nothing was computed for the item",
                    remedy=f"Name one of {sorted(self.sources)}",
                )
            )
        return found[0]

    async def score(self, item: ScoreItem) -> Scores:
        """The scores of an item. Cancelling the call drops the item if nobody else waits for the same.

        Raises:
            BadRequest, MessageTooLarge, ScoreProvenanceMismatch: it cannot be scored here.
            Overloaded: not now. DeadlinePassed: no longer. TeacherFailed: its teacher is broken.
            SchedulerFailed: the server is.
        """
        source = self.teacher_for(item)
        arrived = self._clock()
        tokens = self._check(item, source)
        key = item.key(source.info.provenance)
        if self._cache is not None and key not in self._jobs:
            loop = asyncio.get_running_loop()
            cached = await loop.run_in_executor(self._disk, from_cache, self._cache, key, item)
            if cached is not None:
                self.counters.cached_items += 1
                return cached
        deadline = None if item.deadline_s is None else arrived + item.deadline_s
        scores: Scores = await self._wait(key, source.info.id, tokens, item, deadline)
        self.counters.answered_s.add(self._clock() - arrived)
        return answer_for(item, scores)

    async def head(self, teacher_id: str) -> StoredHead:
        """The LM head of a teacher, on disk. The teacher is loaded in its turn if the head was never asked for.

        Raises:
            BadRequest: there is no such teacher, or it has no head that could be used.
            TeacherFailed: it cannot be loaded. Overloaded: not now. SchedulerFailed: the server is broken.
        """
        source = self.teacher_for(ScoreItem(_NOTHING, (0, 0), teacher_id))
        provenance = source.info.provenance
        stored = await asyncio.get_running_loop().run_in_executor(self._disk, self._heads.get, provenance)
        if stored is None:
            stored = await self._wait(f"head {teacher_id}", teacher_id, 1, None, None)
        return stored

    def _check(self, item: ScoreItem, source: TeacherSource) -> int:
        """Tokens that the item reads. Raises what `score` does if it cannot be scored here."""
        limits, tokens = self.limits, len(item.read_ids())
        result_bytes = item.result_bytes(source.info.hidden_size)
        if tokens > limits.max_item_tokens or result_bytes > limits.max_item_result_bytes:
            raise MessageTooLarge(
                problem(
                    f"the item reads {tokens} tokens for a result of {result_bytes} bytes; the limits are "
                    f"{limits.max_item_tokens} and {limits.max_item_result_bytes}",
                    consequence="Nothing was computed for it",
                    remedy="Score a shorter span, want less, or raise the server's limits",
                )
            )
        source.info.check(item)
        check_provenance(source.info.provenance, item.expected, item.teacher)
        return tokens

    async def _wait(self, key: str, teacher: str, tokens: int, item: ScoreItem | None, deadline_s: float | None) -> Any:
        if self._crash is not None or self._stopping:
            raise broken(self._crash) if self._crash else stopped()
        if (failure := self.room.failure(teacher)) is not None:
            raise failure
        job = self._jobs.get(key)
        if job is not None:
            self.counters.coalesced_items += 1
        elif self.queued_tokens and self.queued_tokens + tokens > self.limits.max_queued_tokens:
            self.counters.refused_overload += 1
            raise self.overloaded(f"{self.queued_tokens} tokens are queued of {self.limits.max_queued_tokens}")
        else:
            job = self._jobs[key] = Job(key, teacher, tokens, self._clock(), item)
            if self.busy is None or teacher not in self._queues:
                self._wake.set()  # otherwise it changes nothing before the unit is done
            self._queues.add(job)
            self.queued_tokens += tokens
            self.residency.arrived(teacher, job.arrived_s)
        self.counters.accepted_items += 1
        waiter = Waiter(item, asyncio.get_running_loop().create_future(), deadline_s)
        job.waiters.append(waiter)
        try:
            return await waiter.future
        finally:
            job.waiters.remove(waiter)
            if not waiter.future.done() or waiter.future.cancelled():
                self.counters.cancelled += 1
            if not job.waiters and not job.running and self._jobs.get(key) is job:
                self._queues.remove(job)
                self._leave(job)

    def overloaded(self, what: str) -> Overloaded:
        """The error that tells a caller when to come back: when half of what is queued should be done."""
        c = self.counters
        rate = c.scored_tokens / c.busy_s if c.busy_s and c.scored_tokens else 1e5
        delay = min(60.0, max(0.05, self.queued_tokens / rate / 2))
        return Overloaded(
            problem(
                what,
                consequence="The item was not accepted",
                remedy=f"Send it again in {delay:.2f} s, or elsewhere",
            ),
            delay,
        )

    async def _supervise(self) -> None:
        try:
            await self._run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a defect; whoever waits must hear of it
            self._crash = error
            log.critical("scheduler failed", exc_info=error)
            if self._unit_task is not None:  # what it computes is right
                await asyncio.wait((self._unit_task,))
            self._fail_all(broken(error))
            self.crashed.set()

    async def _run(self) -> None:
        for teacher in sorted(self.residency.pinned):
            self.room.begin(teacher)
            await self.room.wait()
        while True:
            if self.busy is None:
                self._drop_dead()
            if self._unit_task is not None and self._unit_task.done():
                done, self._unit_task = self._unit_task, None
                done.result()
            working = None if self.busy is None else self.busy[0]
            now = self._clock()
            plan = self.residency.plan(self._queues.waiting(), now, loading=self.room.loading, busy=working)
            if plan.load is not None:
                self.room.begin(plan.load, plan.evict)
            if plan.work is not None:
                self._begin(plan.work, now)
            await self._pause(plan.again_s - now)

    async def _pause(self, until_due_s: float) -> None:
        """Until something arrives, a teacher is loaded, a unit is done, or a load becomes due."""
        idle = not self._jobs
        # Deadlines pass while the work waits for more; whoever waits for them hears of it soon.
        timeout = None if idle else max(0.001, min(0.25 if self.busy is None else 60.0, until_due_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):  # not wait_for: it may swallow a cancellation
                await self._wake.wait()
        self._wake.clear()
        if idle and self.limits.linger_s:
            await asyncio.sleep(self.limits.linger_s)

    def _begin(self, teacher_id: str, now_s: float) -> None:
        """A unit of a teacher's work."""
        jobs = self._queues.take(teacher_id, self.limits.work_tokens)
        for job in jobs:
            job.running = True
            self.counters.waited_s.add(now_s - job.arrived_s)
        self.busy = teacher_id, now_s
        self._unit_task = asyncio.create_task(self._unit(teacher_id, jobs))

    async def _unit(self, teacher_id: str, jobs: list[Job]) -> None:
        loop, started = asyncio.get_running_loop(), self._clock()
        try:
            await loop.run_in_executor(self._compute, self._work, self.room.teachers[teacher_id], jobs, loop)
        finally:
            took = self._clock() - started
            self.busy = None
            self.counters.busy_s += took
            self.residency.worked(teacher_id, took)
            self._wake.set()

    def _work(self, teacher: Teacher, jobs: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        """On the compute thread: every job is settled, whatever happens."""
        open_jobs = dict.fromkeys(jobs)

        def settle(job: Job, outcome: Any) -> None:
            del open_jobs[job]
            loop.call_soon_threadsafe(self._settle, job, outcome)

        try:
            for job in [job for job in jobs if job.item is None]:
                settle(job, self._heads.put(teacher.info.provenance, teacher.head()))
            scored = [job for job in jobs if job.item is not None]
            items = [job.item for job in scored if job.item is not None]
            left_out: list[Job] = []

            def wanted(i: int) -> bool:
                if self._wanted(scored[i]):
                    return True
                left_out.append(scored[i])
                return False

            for i, outcome in teacher.stream(items, wanted):
                settle(scored[i], checked(teacher, items[i], outcome))
            for job in left_out:
                settle(job, None)
            error: Exception = RuntimeError("it gave no answer")
        except Exception as raised:  # whatever a teacher raises, the server goes on
            error = raised
        for job in list(open_jobs):
            settle(job, error if isinstance(error, RolloutWalError) else unknown_failure(teacher, error))

    def _wanted(self, job: Job) -> bool:
        return not self._stopping and job.wanted(self._clock())

    def _settle(self, job: Job, outcome: Any) -> None:
        """Answer everyone who waits for a job."""
        if outcome is None and self._wanted(job):  # somebody joined after it was left out
            job.running = False
            self._queues.add(job)
            self._wake.set()
            return
        self._leave(job)
        if isinstance(outcome, Exception):
            self.counters.failed += 1
        elif isinstance(outcome, Scores):
            self.counters.scored_items += 1
            self.counters.scored_tokens += job.tokens
            self._keep(outcome)
        now = self._clock()
        for waiter in tuple(job.waiters):
            if waiter.future.done():
                continue
            if isinstance(outcome, Exception):
                waiter.future.set_exception(outcome)
            elif outcome is None:
                self._too_late(job, waiter, now)
            else:
                waiter.future.set_result(outcome)

    def _leave(self, job: Job) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self.queued_tokens -= job.tokens

    def _keep(self, scores: Scores) -> None:
        """Hand scores to the disk. One that cannot follow costs time later, and no memory now."""
        if self._cache is None or self._stopping:
            return
        size = scores.nbytes
        if self._disk_backlog + size > self.limits.cache_backlog_bytes:
            self.counters.cache_skipped += 1
            return
        self._disk_backlog += size

        def done(_: object) -> None:
            self._disk_backlog -= size

        asyncio.get_running_loop().run_in_executor(self._disk, self._cache.put, scores).add_done_callback(done)

    def _loaded(self, teacher_id: str, error: RolloutWalError | None) -> None:
        """A load has ended. If it failed, so do the teacher's items."""
        for job in self._queues.of(teacher_id) if error is not None else ():
            self._queues.remove(job)
            self._settle(job, error)
        self._wake.set()

    def _drop_dead(self) -> None:
        """Take out what nobody waits for any more, before anything is computed for it."""
        now = self._clock()
        for job in self._queues:
            for waiter in tuple(job.waiters):
                if not waiter.future.done() and not waiter.waits(now):
                    self._too_late(job, waiter, now)
            if not job.wanted(now):
                self._queues.remove(job)
                self._leave(job)

    def _too_late(self, job: Job, waiter: Waiter, now_s: float) -> None:
        self.counters.deadline_passed += 1
        limit = waiter.item.deadline_s if waiter.item is not None else None
        waiter.future.set_exception(
            DeadlinePassed(
                problem(
                    f"the item waited {now_s - job.arrived_s:.2f} s and its deadline was {limit} s",
                    consequence="Nothing was computed for it",
                    remedy="Allow more time, or send less at once",
                )
            )
        )

    def _fail_all(self, error: Exception) -> None:
        jobs: Iterable[Job] = list(self._jobs.values())
        self._queues = Queues()
        for job in jobs:
            job.running = True  # in no queue any more
            self._leave(job)
            for waiter in tuple(job.waiters):
                if not waiter.future.done():
                    waiter.future.set_exception(error)
