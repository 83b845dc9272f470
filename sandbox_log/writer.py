"""One thread that commits for everybody: LMDB has one write transaction at a time and knows no group commit.

Whatever is asked for while a commit is under way is committed together by the next. There is no timer: a lone caller
waits for one commit, a thousand callers wait for two.

The first error of a write or sync poisons the log for good, see `poison`. Every waiter gets it, now and later.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from .environment import Environment
from .errors import SandboxError
from .faults import Faults
from .poison import Poison, poisoned

#: A batch is never larger, so that one transaction's pages fit in memory and its waiters wait a bounded time.
BATCH_JOBS_MAX = 4096


class Job(Protocol):
    """Something to do inside the shared transaction."""

    fault_point: str | None

    def apply(self, txn: Any) -> Any:
        """Check everything, then write. An error raised here must come before the first write: the others'
        work in the same transaction is committed all the same. May run twice, in two transactions.

        Raises:
            SandboxError: refused; only this job's caller hears of it.
        """
        ...

    def confirm(self, txn: Any) -> None:
        """Look again, after the sync and before anybody is told.

        Raises:
            SandboxError: it does not count any more, and must not be acknowledged.
        """
        ...


@dataclass(slots=True)
class _Waiting:
    job: Job
    future: Future[Any]


class GroupCommitter:
    """The thread and its queue.

    Args:
        environment: where to write; nobody else may write to it in this process.
        faults: called at the labelled points, for tests.
        poison: ends writing, here and wherever else the log is written.
    """

    def __init__(self, environment: Environment, faults: Faults, poison: Poison) -> None:
        self._environment = environment
        self._faults = faults
        self._poison = poison
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self.commits = 0
        """Durable commits so far."""
        self._thread = threading.Thread(target=self._run, name="sandbox-log-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job. Its future holds what `apply` returned once that is durable, or the error."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # what is queued is written; nobody can take it back
        with self._lock:
            if self._poison.failure is not None:
                future.set_exception(poisoned(self._poison.failure))
            elif self._closed:
                future.set_exception(poisoned(RuntimeError("the log was closed")))
            else:
                self._queue.put(_Waiting(job, future))
        return future

    def close(self) -> None:
        """Commit what is queued, then end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < BATCH_JOBS_MAX:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    last = True
                    break
                batch.append(item)
            self._commit(batch)
            if last:
                return

    def _commit(self, batch: Sequence[_Waiting]) -> None:
        if self._poison.failure is not None:
            for waiting in batch:
                waiting.future.set_exception(poisoned(self._poison.failure))
            return
        try:
            answers = self._environment.write(lambda txn: self._apply(txn, batch))
            self.commits += 1
            with self._environment.read() as txn:
                answers = [_confirm(txn, waiting.job, answer) for waiting, answer in zip(batch, answers, strict=True)]
        except BaseException as error:
            self._poison.spread(error)
            for waiting in batch:
                waiting.future.set_exception(poisoned(error))
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if isinstance(answer, SandboxError):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(answer)

    def _apply(self, txn: Any, batch: Sequence[_Waiting]) -> list[Any]:
        answers = [_apply(txn, waiting.job) for waiting in batch]
        for waiting in batch:
            if waiting.job.fault_point is not None:
                self._faults(waiting.job.fault_point)
        return answers


def _apply(txn: Any, job: Job) -> Any:
    try:
        return job.apply(txn)
    except SandboxError as error:
        return error


def _confirm(txn: Any, job: Job, answer: Any) -> Any:
    if isinstance(answer, SandboxError):
        return answer
    try:
        job.confirm(txn)
    except SandboxError as error:
        return error
    return answer
