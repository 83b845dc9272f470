"""Replacing the weights of every worker: prepare everywhere, log the version, commit everywhere.

From the first prepare to the last commit nobody samples. Killed before the version is durable in the job log, every
worker comes back on the old weights; killed after, on the new.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from concurrent.futures import Future

from ..errors import BackendError, RolloutWalError, problem
from ..wal import RolloutWal
from .pool import WorkerHandle, WorkerState

_DEATHS = 3


class WeightsUpdate:
    """One update. `done` gives the digest once every worker is on the new weights, or why there are none."""

    def __init__(self, wal: RolloutWal, workers: Sequence[WorkerHandle], version: int, source: str) -> None:
        self.version = version
        self.done: Future[str] = Future()
        self._wal = wal
        self._workers = workers
        self._source = source
        self._asked: set[str] = set()
        self._digests: dict[str, str] = {}
        self._committing: set[str] | None = None
        self._deaths = 0
        self._digest = ""

    def prepared(self, worker: WorkerHandle, version: int, digest: str) -> None:
        if version == self.version and worker.name in self._asked:
            self._digests[worker.name] = digest

    def unprepared(self, version: int, error: BaseException) -> None:
        """A worker cannot load the weights. It may speak of an earlier update, which was given up."""
        if version == self.version:
            self.give_up(error)

    def committed(self, worker: WorkerHandle, version: int) -> None:
        if version == self.version and self._committing is not None:
            self._committing.discard(worker.name)

    def died(self, worker: WorkerHandle) -> None:
        """Before the version is logged, its successor is asked again; after, it starts on the new weights."""
        self._digests.pop(worker.name, None)
        if self._committing is not None:
            self._committing.discard(worker.name)
        elif worker.name in self._asked:
            self._asked.discard(worker.name)
            self._deaths += 1
            if self._deaths >= _DEATHS:
                self.give_up(
                    BackendError(
                        problem(
                            f"workers died {self._deaths} times while they loaded {self._source}",
                            consequence="The policy version was not changed; the old weights stay in force",
                            remedy="See the workers' messages on standard error; memory for two sets of weights may "
                            "be missing",
                        )
                    )
                )

    def give_up(self, error: BaseException) -> None:
        """Workers that hold weights nobody declared are not trusted again: they die, and come back on the old."""
        if self.done.done():
            return
        if self._committing is None:
            for worker in self._workers:
                if worker.name in self._asked:
                    worker.signal(signal.SIGKILL)
        self.done.set_exception(error)

    def advance(self) -> bool:
        """Take the next step that is due. True: it is over."""
        if self.done.done():
            return True
        if self._committing is not None:
            if self._committing:
                return False
            self.done.set_result(self._digest)
            return True
        if any(w.state is not WorkerState.READY for w in self._workers):
            return False  # one is starting: it will be asked when it is ready
        for worker in self._workers:
            if worker.name not in self._asked:
                self._asked.add(worker.name)
                worker.send({"t": "prepare", "version": self.version, "source": self._source})
        if len(self._digests) == len(self._workers):
            self._commit()
        return self.done.done()

    def _commit(self) -> None:
        digests = sorted(set(self._digests.values()))
        if len(digests) > 1:
            self.give_up(
                BackendError(
                    problem(
                        f"the workers read different weights from {self._source}: digests {digests}",
                        consequence="The policy version was not changed, and the workers go back to the old weights",
                        remedy="Write the weights completely before update_weights, and do not change them after",
                    )
                )
            )
            return
        self._digest = digests[0]
        try:
            self._wal.wait_durable(self._wal.declare_policy(self.version, self._digest, self._source))
        except RolloutWalError as error:
            if self._wal.log.writer.poisoned:
                raise
            self.give_up(error)
            return
        self._committing = {w.name for w in self._workers}
        for worker in self._workers:
            worker.send({"t": "commit", "version": self.version, "digest": self._digest, "source": self._source})
