"""What others do on a dead worker, run for real: start again, or go on from a log that delivery does not wait for."""

from __future__ import annotations

import select
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..backend.nursery import Nursery
from ..backend.pool import WorkerHandle
from ..backend.scheduler import noise_key
from ..backend.spec import EngineSpec
from ..backend.wire import Message
from ..engine_log import EngineLog
from ..params import SamplingParams
from ..step import decode_step
from .killer import KillSchedule

Mode = Literal["restart", "early", "regenerate"]
_MAIN = "rollout_wal.demo.baseline_worker:baseline_main"
_SLOTS_MAX = 1 << 16


@dataclass(slots=True)
class _Rollout:
    index: int
    prompt: NDArray[np.int32]
    seed: int
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    """Kept so far: the durable prefix of earlier attempts, then what this attempt has shown."""
    prefix: int = 0
    """How many of them this attempt was given."""
    interrupted: bool = False


@dataclass(slots=True)
class BaselineResult:
    """What came out, and what it cost."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """Output tokens by rollout index, in order of completion."""
    interruptions: int = 0
    """Deaths, counted once for each rollout that was running."""
    interrupted_rollouts: int = 0
    tokens_lost: int = 0
    """Tokens that a worker had shown and that are in no delivered rollout."""
    tokens_recomputed: int = 0
    """Tokens sampled or prefilled again because of a death."""
    deaths: int = 0


class Baseline:
    """Runs one cohort to its end under a kill schedule.

    Args:
        mode: restart: a lost attempt starts from scratch with fresh noise. regenerate: from scratch, with the same
            seed. early: from the durable tokens with fresh noise; finished rollouts are delivered at once.
        lag: steps by which tokens are durable late (early only).
    """

    def __init__(
        self, spec: EngineSpec, folder: Path, *, mode: Mode, workers: int, slots: int, lag: int, schedule: KillSchedule
    ) -> None:
        self._mode: Mode = mode
        self._spec = spec
        self._slots = slots
        self._lag = lag
        self._schedule = schedule
        self._workers = [WorkerHandle(f"{i}", folder / f"{i}") for i in range(workers)]
        self._slot: dict[str, dict[int, _Rollout]] = {w.name: {} for w in self._workers}
        self._next_slot: dict[str, int] = {}
        self._limits: dict[str, tuple[int, int]] = {}
        self.result = BaselineResult()

    def run(
        self,
        prompts: Sequence[NDArray[np.int32]],
        seeds: Sequence[int],
        sampling: SamplingParams,
        *,
        tick: Callable[[int], None],
    ) -> BaselineResult:
        """`tick(n)` is called with the number of finished rollouts."""
        waiting = deque(_Rollout(i, p, s) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True)))
        nursery = Nursery(self._spec.module, threads=self._spec.threads)
        try:
            for worker in self._workers:
                shutil.rmtree(worker.log, ignore_errors=True)
                self._start(nursery, worker)
            while len(self.result.tokens) < len(prompts):
                self._submit(waiting, sampling)
                self._listen()
                for worker in self._workers:
                    limit, number = self._limits[worker.name]
                    if worker.steps >= limit and not worker.dead():
                        worker.signal(number)
                        worker.dead(10.0)
                    if worker.dead():
                        self._hear(worker)
                        self._lose(worker, waiting)
                        self._start(nursery, worker)
                tick(len(self.result.tokens))
        finally:
            for worker in self._workers:
                worker.signal(9)
                worker.dead(5.0)
                worker.bury()
            nursery.close()
        return self.result

    def _start(self, nursery: Nursery, worker: WorkerHandle) -> None:
        config: Message = {
            "main": _MAIN,
            "spec": self._spec.to_message(),
            "log": str(worker.log) if self._mode == "early" else "",
            "lag": self._lag,
        }
        worker.born(*nursery.fork(config))
        self._limits[worker.name] = self._schedule.life(worker.name, worker.starts)
        self._next_slot[worker.name] = 0

    def _submit(self, waiting: deque[_Rollout], sampling: SamplingParams) -> None:
        while waiting:
            worker = min(self._workers, key=lambda w: len(self._slot[w.name]))
            running = self._slot[worker.name]
            if len(running) >= self._slots:
                return
            rollout = waiting.popleft()
            rollout.attempt += 1
            slot = self._next_slot[worker.name] % _SLOTS_MAX
            self._next_slot[worker.name] += 1
            running[slot] = rollout
            worker.send(
                {
                    "slot": slot,
                    "rollout": rollout.index,
                    "attempt": rollout.attempt,
                    "prompt": rollout.prompt.tobytes(),
                    "prefix": np.asarray(rollout.tokens, np.int32).tobytes(),
                    "sampling": sampling.to_dict(),
                    "key": noise_key(
                        rollout.seed, "position" if self._mode == "regenerate" else "attempt", rollout.attempt
                    ),
                }
            )

    def _listen(self) -> None:
        channels = {w.channel.sock: w for w in self._workers if w.channel is not None}
        for sock in select.select(list(channels), [], [], 0.1)[0]:
            self._hear(channels[sock])

    def _hear(self, worker: WorkerHandle) -> None:
        if worker.channel is None:
            return
        running = self._slot[worker.name]
        for message in worker.channel.receive():
            if message["t"] != "step":
                continue
            worker.steps += 1
            step = decode_step(message["payload"])
            for slot, token, finish in zip(step.slot_R.tolist(), step.token_N.tolist(), step.finish_R.tolist()):
                rollout = running[slot]
                rollout.tokens.append(token)
                if finish:
                    del running[slot]
                    self.result.tokens[rollout.index] = rollout.tokens

    def _lose(self, worker: WorkerHandle, waiting: deque[_Rollout]) -> None:
        """The worker is dead. What is not durable of its running attempts is gone."""
        worker.bury()
        running, self._slot[worker.name] = self._slot[worker.name], {}
        durable: dict[tuple[int, int], list[int]] = {}
        if self._mode == "early":
            log = EngineLog.open(worker.log, segment_bytes=1 << 20)
            for key, stream in log.state.streams.items():
                durable[key] = stream.token_T.tolist()
            log.forget([key[0] for key in log.state.streams])
            log.close()
        self.result.deaths += 1
        for rollout in running.values():
            shown = len(rollout.tokens)
            if self._mode == "early":
                kept = rollout.tokens[: rollout.prefix] + durable.get((rollout.index, rollout.attempt), [])
                self.result.tokens_recomputed += len(kept)  # by prefill; what is lost is sampled again on top
            else:
                kept = []
            lost = max(0, shown - len(kept))
            self.result.interruptions += 1
            self.result.interrupted_rollouts += not rollout.interrupted
            rollout.interrupted = True
            self.result.tokens_lost += lost
            self.result.tokens_recomputed += lost
            rollout.tokens = kept
            rollout.prefix = len(kept)
            waiting.appendleft(rollout)
