"""The teachers in memory: loaded one at a time on a thread of its own, evicted when another needs the room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rollout_wal.errors import RolloutWalError

from .counters import Counters, count
from .errors import TeacherFailed, problem
from .residency import Residency
from .teachers.base import Teacher, TeacherSource

log = logging.getLogger(__name__)

#: A teacher that failed to load is left alone for so long, doubled by every further failure.
RETRY_S, RETRY_MAX_S = 1.0, 60.0


class TeacherRoom:
    """Loads and evicts as the residency says. All but loading itself happens on the event loop.

    Args:
        sources: by id.
        residency: what fits.
        counters: where loads and evictions are counted.
        clock: seconds, monotonic.
        ended: called with every load that ended: the teacher, and why it failed or None.
    """

    def __init__(
        self,
        sources: Mapping[str, TeacherSource],
        residency: Residency,
        counters: Counters,
        clock: Callable[[], float],
        ended: Callable[[str, RolloutWalError | None], None],
    ) -> None:
        self.teachers: dict[str, Teacher] = {}
        self.loading: str | None = None
        self._sources, self._residency, self._counters = sources, residency, counters
        self._clock, self._ended = clock, ended
        self._failed: dict[str, tuple[RolloutWalError, int, float]] = {}
        """Why, how often in a row, and until when it is not tried again."""
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "scoring-load")

    def failure(self, teacher_id: str) -> RolloutWalError | None:
        """Why a teacher cannot work at present; None if it can, or may be tried again."""
        if teacher_id not in self._failed:
            return None
        error, _, until_s = self._failed[teacher_id]
        return type(error)(str(error)) if self._clock() < until_s else None  # a new one: tracebacks grow

    def failing(self) -> dict[str, str]:
        """Teachers whose last load failed and is not to be tried again yet, each with the reason."""
        now = self._clock()
        return {t: str(error) for t, (error, _, until_s) in dict(self._failed).items() if now < until_s}

    def begin(self, teacher_id: str, evict: Sequence[str] = ()) -> None:
        """Start to load a teacher after others are gone. No other load is under way."""
        evicted = [self._evict(victim) for victim in evict]
        self._residency.reserve(teacher_id)
        self.loading = teacher_id
        self._task = asyncio.create_task(self._load(teacher_id, evicted))

    async def wait(self) -> None:
        """For the load under way."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        going = list(self.teachers.values())
        self.teachers.clear()
        await asyncio.get_running_loop().run_in_executor(None, _close, going)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _load(self, teacher_id: str, evicted: list[Teacher]) -> None:
        started = self._clock()
        error: RolloutWalError | None = None
        try:
            loop = asyncio.get_running_loop()
            source = self._sources[teacher_id]
            self.teachers[teacher_id] = await loop.run_in_executor(self._thread, _make_room, evicted, source)
        except Exception as raised:  # whatever loading raises, the other teachers go on
            error = raised if isinstance(raised, RolloutWalError) else _load_failure(teacher_id, raised)
        now = self._clock()
        self.loading = None
        self._counters.load_s += now - started
        if error is None:
            self._failed.pop(teacher_id, None)
            self._residency.loaded(teacher_id, now - started)
            count(self._counters.loads, teacher_id)
            log.info("teacher loaded", extra={"teacher": teacher_id, "seconds": round(now - started, 3)})
        else:
            self._residency.evicted(teacher_id)
            times = self._failed[teacher_id][1] + 1 if teacher_id in self._failed else 1
            wait_s = min(RETRY_MAX_S, RETRY_S * 2.0 ** (times - 1))
            self._failed[teacher_id] = error, times, now + wait_s
            count(self._counters.load_failures, teacher_id)
            log.error(
                "teacher failed to load", extra={"teacher": teacher_id, "error": str(error), "again_in_s": wait_s}
            )
        self._ended(teacher_id, error)

    def _evict(self, teacher_id: str) -> Teacher:
        self._residency.evicted(teacher_id)
        count(self._counters.evictions, teacher_id)
        log.info("teacher evicted", extra={"teacher": teacher_id})
        return self.teachers.pop(teacher_id)


def _make_room(evicted: list[Teacher], source: TeacherSource) -> Teacher:
    """On the loading thread: free the memory of those that go, then load the one that comes."""
    _close(evicted)
    return source.load()


def _close(teachers: list[Teacher]) -> None:
    while teachers:
        teachers.pop().close()


def _load_failure(teacher_id: str, error: Exception) -> TeacherFailed:
    return TeacherFailed(
        problem(
            f"teacher {teacher_id!r} cannot be loaded: {type(error).__name__}: {error}",
            consequence="Its items fail; other teachers are not affected",
            remedy="If memory ran out, give this server fewer teachers at a time; otherwise repair the checkpoint",
        )
    )
