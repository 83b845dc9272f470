"""`RolloutBackend` as an auditable backend: one cohort per rollout, workers killed from outside.

The verbs of the audit are one rollout at a time; whoever has many prompts at hand calls `RolloutBackend.generate`.
"""

from __future__ import annotations

import asyncio
import queue
import random
import signal
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Final, Literal

from ...backend import RolloutBackend
from ...backend.finished import FinishedRollout
from ...errors import AuditError, problem
from ...params import SamplingParams
from ..backends import Finished, InterruptKind

_SIGNALS: Final[dict[InterruptKind, signal.Signals]] = {"kill": signal.SIGKILL, "preempt": signal.SIGTERM}
_POLL_S: Final = 0.002


class LogBackend:
    """Audits a running RolloutBackend. Its life is the caller's: `close` stops listening, not the backend.

    Args:
        backend: running, on a directory of its own; it must not be used for anything else meanwhile.
        noise: "attempt" draws afresh at each resume, as measuring bias takes; "position" repeats lost tokens, so that
            rollouts can be compared token for token.
        name: prefix of the cohorts; another one for each run on the same directory.
        ready_s: how long `interrupt` waits for a worker that can be interrupted, and for its death.

    With one worker `Finished.failure` is the last death that hit the rollout; with several it is not known, and -1.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        *,
        noise: Literal["position", "attempt"] = "attempt",
        name: str = "audit",
        seed: int = 0,
        ready_s: float = 60.0,
    ) -> None:
        self._backend = backend
        self._noise = noise
        self._name = name
        self._random = random.Random(seed)
        self._ready_s = ready_s
        self._one_worker = len(backend.worker_pids()) == 1
        self._submitted = 0
        self._out: queue.SimpleQueue[Finished | BaseException] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="audit", daemon=True)
        self._thread.start()

    def submit(self, prompt_tokens: Sequence[int], sampling: SamplingParams, seed: int) -> int:
        rollout_id = self._submitted
        self._submitted += 1
        work = self._generate(rollout_id, list(prompt_tokens), sampling, seed)
        self._loop.call_soon_threadsafe(self._begin, work)
        return rollout_id

    def interrupt(self, kind: InterruptKind) -> None:
        """Kill one of the workers that are ready. Returns when it is dead; the backend starts the next one by itself.

        Raises:
            AuditError: no worker was ready, or none died, in time.
        """
        deadline = time.monotonic() + self._ready_s
        while not (ready := sorted(self._backend.worker_steps())):
            self._wait(deadline, "no worker was ready to be interrupted")
        name, deaths = self._random.choice(ready), self._backend.stats.deaths
        self._backend.kill_worker(name, _SIGNALS[kind])
        while self._backend.stats.deaths == deaths:
            self._wait(deadline, f"worker {name} did not die of {_SIGNALS[kind].name}")

    def collect(self) -> Iterable[Finished]:
        while True:
            try:
                item = self._out.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, deadline: float, what: str) -> None:
        if time.monotonic() > deadline:
            raise AuditError(
                problem(
                    f"{what} within {self._ready_s:g} s",
                    consequence="The run was not audited",
                    remedy="See the backend's messages, or allow more time",
                )
            )
        time.sleep(_POLL_S)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    async def _generate(self, rollout_id: int, prompt: list[int], sampling: SamplingParams, seed: int) -> None:
        try:
            async for rollout in self._backend.generate_async(
                [prompt], sampling, seed=seed, cohort=f"{self._name}/{rollout_id}", noise=self._noise
            ):
                self._out.put(self._finished(rollout_id, rollout))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # in another thread it would be silence: hand it to whoever collects
            self._out.put(error)

    def _finished(self, rollout_id: int, r: FinishedRollout) -> Finished:
        known = bool(r.output.logprob.valid_T.all())
        return Finished(
            rollout_id,
            r.tokens.tolist(),
            r.output.logprob.value_T.tolist() if known else [],
            r.finish_reason.name.lower(),
            r.interruptions,
            censored=r.censored or "",
            failure=self._backend.stats.deaths if r.interruptions and self._one_worker else -1,
        )
