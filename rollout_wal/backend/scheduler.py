"""Who runs next, and where: rollouts that wait, and the attempts that they are given.

An attempt is durable before any engine hears of it (I5, I10): a later owner must be able to tell which of two engines
that both hold tokens of a rollout is the one that counts, and where its tokens begin.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable

from ..episode import turn_sampling
from ..job_state import Rollout
from ..wal import RolloutWal
from .endings import Endings
from .fleet import Fleet
from .poison import Quarantine
from .pool import WorkerHandle
from .stats import Stats
from .waiting import Waiting


class Scheduler:
    """See the module. For the coordinator's thread.

    Args:
        slots: rollouts that a worker runs at once.
        workers_tell: whether workers say how a resumed rollout was prefilled; if not, it is counted here.
    """

    def __init__(
        self,
        wal: RolloutWal,
        fleet: Fleet,
        quarantine: Quarantine,
        endings: Endings,
        stats: Stats,
        *,
        slots: int,
        workers_tell: bool,
    ) -> None:
        self._wal = wal
        self._fleet = fleet
        self._quarantine = quarantine
        self._endings = endings
        self._stats = stats
        self._slots = slots
        self._workers_tell = workers_tell
        self._pending = Waiting()
        self._died_at: dict[int, float] = {}

    @property
    def waiting(self) -> int:
        """How many rollouts wait for a worker."""
        return len(self._pending) + len(self._quarantine.waiting)

    def last(self, rollouts: Iterable[int]) -> None:
        """They run after what waits already."""
        for rollout in rollouts:
            self._pending.append(rollout)

    def first(self, rollouts: list[int]) -> None:
        """They run before what waits already, in this order."""
        self._pending.prepend(rollouts)

    def died(self, rollouts: Iterable[int]) -> None:
        """Their worker is dead."""
        now = time.monotonic()
        for rollout in rollouts:
            self._died_at[rollout] = now

    def over(self, rollout: int) -> None:
        """It has ended, or was given up: wherever it waits, it does so no longer."""
        self._pending.remove(rollout)
        self._quarantine.over(rollout)
        self._died_at.pop(rollout, None)

    def schedule(self) -> None:
        """Give waiting rollouts to the workers that have room, the least loaded first."""
        ready = [w for w in self._fleet.ready() if not self._quarantine.occupies(w)]
        chosen: list[tuple[WorkerHandle, Rollout, int]] = []
        if self._quarantine.waiting and ready:
            # A suspect waits for an empty worker. One worker takes nothing new until it is.
            worker = min(ready, key=lambda w: len(w.running))
            ready.remove(worker)
            if not worker.running:
                chosen.append(self._assign(worker, self._quarantine.waiting.pop()))
                self._quarantine.enter(worker, chosen[0][1].id, chosen[0][2])
        while self._pending and ready:
            worker = min(ready, key=lambda w: len(w.running))
            if len(worker.running) >= self._slots:
                break
            chosen.append(self._assign(worker, self._pending.pop()))
        if not chosen:
            return
        self._wal.wait_durable()  # see the module: one sync for all of them
        for worker, r, attempt in chosen:
            self._submit(worker, r, attempt)

    def _assign(self, worker: WorkerHandle, rollout: int) -> tuple[WorkerHandle, Rollout, int]:
        r = self._wal.rollout(rollout)
        cause = "turn" if r.answered else "resume" if r.attempts else "start"
        attempt = self._wal.attempt(r.id, worker.name, cause)
        worker.running[r.id] = attempt.attempt
        return worker, r, attempt.attempt

    def _submit(self, worker: WorkerHandle, r: Rollout, attempt: int) -> None:
        tokens = self._wal.tokens(r.id)
        died = self._died_at.pop(r.id, None)
        if died is not None:
            self._stats.seconds_resuming += time.monotonic() - died
        cause = r.attempts[-1].cause
        if cause == "resume":
            self._stats.resumed += 1
            if not self._workers_tell:
                self._stats.by["prefill"] += 1
                self._stats.tokens_prefilled += len(tokens)
        self._endings.watch(r, tokens)
        worker.send(
            {
                "t": "submit",
                "rollout": r.id,
                "attempt": attempt,
                "cause": cause,
                "oldest": next(iter(self._wal.state.in_flight)) if self._workers_tell else 0,
                "prompt": r.begin.prompt.tobytes(),
                "prefix": tokens.token_T.tobytes(),
                "sampled": tokens.sampled_T.tobytes(),
                "sampling": turn_sampling(r.begin),
                "key": noise_key(r.begin.seed, r.begin.noise, attempt),
            }
        )


def noise_key(seed: int, noise: str, attempt: int) -> int:
    """The 64-bit key of a rollout's noise: the seed itself, or, drawn afresh at each resume, seed and attempt."""
    if noise == "position":
        return seed
    h = hashlib.blake2b(seed.to_bytes(8, "little") + attempt.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(h.digest(), "little")
