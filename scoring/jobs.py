"""Accepted work: what is to be computed once, and everyone who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .batching import context_key
from .items import ScoreItem
from .residency import Waiting


@dataclass(slots=True, eq=False)
class Waiter:
    """One caller.

    Args:
        item: what it asked for, or None for a head.
        future: its answer.
        deadline_s: on the scheduler's clock; None: no deadline.
    """

    item: ScoreItem | None
    future: asyncio.Future[Any]
    deadline_s: float | None

    def waits(self, now_s: float) -> bool:
        return not self.future.done() and (self.deadline_s is None or now_s < self.deadline_s)


@dataclass(slots=True, eq=False)
class Job:
    """Something to compute once.

    Args:
        key: its content address.
        teacher: who computes it.
        tokens: that it makes the teacher read.
        arrived_s: when the first of its waiters came.
        item: what to score; None: the teacher's head is wanted.
        waiters: at least one while it is queued.
    """

    key: str
    teacher: str
    tokens: int
    arrived_s: float
    item: ScoreItem | None
    waiters: list[Waiter] = field(default_factory=list)
    context: bytes = b""
    running: bool = False

    def __post_init__(self) -> None:
        if self.item is not None:
            self.context = context_key(self.item)

    def wanted(self, now_s: float) -> bool:
        """Whether anybody still waits. Any thread may ask."""
        return any(waiter.waits(now_s) for waiter in tuple(self.waiters))


class Queues:
    """Jobs that wait, by teacher, each teacher's in order of arrival."""

    def __init__(self) -> None:
        self._jobs: dict[str, dict[Job, None]] = {}
        self._tokens: dict[str, int] = {}

    def __iter__(self) -> Iterator[Job]:
        for jobs in list(self._jobs.values()):
            yield from list(jobs)

    def __contains__(self, teacher: str) -> bool:
        return teacher in self._jobs

    def add(self, job: Job) -> None:
        self._jobs.setdefault(job.teacher, {})[job] = None
        self._tokens[job.teacher] = self._tokens.get(job.teacher, 0) + job.tokens

    def remove(self, job: Job) -> None:
        jobs = self._jobs[job.teacher]
        del jobs[job]
        self._tokens[job.teacher] -= job.tokens
        if not jobs:
            del self._jobs[job.teacher], self._tokens[job.teacher]

    def of(self, teacher: str) -> list[Job]:
        return list(self._jobs.get(teacher, ()))

    def waiting(self) -> dict[str, Waiting]:
        """For the residency. Other threads may look on: a queue that ends in that moment is left out."""
        out = {}
        for teacher, jobs in list(self._jobs.items()):
            try:
                out[teacher] = Waiting(self._tokens[teacher], next(iter(jobs)).arrived_s)
            except (KeyError, StopIteration, RuntimeError):
                continue
        return out

    def take(self, teacher: str, work_tokens: int) -> list[Job]:
        """Remove a unit of work: the oldest jobs, each with all that share its context, up to that many tokens.

        At least one. A group whose prompt is shared is cut only if it alone is too large.
        """
        groups: dict[bytes, list[Job]] = {}
        for job in self._jobs[teacher]:
            groups.setdefault(job.context, []).append(job)
        taken: list[Job] = []
        tokens = 0
        for group in groups.values():
            if taken and tokens + sum(job.tokens for job in group) > work_tokens:
                break
            for job in group:
                if taken and tokens + job.tokens > work_tokens:
                    break
                taken.append(job)
                tokens += job.tokens
        for job in taken:
            self.remove(job)
        return taken
