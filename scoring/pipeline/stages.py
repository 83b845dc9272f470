"""The stages of a pipeline, on its event loop. Nobody else touches what is in here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np

from rollout_wal.backend import RolloutBackend
from rollout_wal.dataset import ColumnGroup, DatasetWriter, Provenance, loss_mask
from rollout_wal.delivery import to_sample
from rollout_wal.errors import RolloutWalError
from rollout_wal.params import SamplingParams

from ..client import AsyncScoringClient, ClientOptions
from ..errors import BadRequest, Overloaded, Unreachable, problem
from ..items import ScoreItem, Scores, Wanted
from ..routing import Router, recorded, routed
from ..tasks import Task, tasks_of
from .options import PipelineOptions, PromptBatch
from .recovery import known
from .state import Batch, Entry, PipelineStats

#: What is no fault of a sample: the pipeline stops rather than drop it.
_NOT_ITS_FAULT = (Unreachable, Overloaded)


class Stages:
    """Arguments as of `Pipeline`.

    Args:
        writer: of the dataset.
        pins: checkpoints of the teachers whose scores the dataset has.
        loop: the event loop that every coroutine of this class runs on.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        writer: DatasetWriter,
        targets: Sequence[str],
        prompts: Callable[[int], PromptBatch | None],
        sampling: SamplingParams,
        *,
        router: Router,
        wanted: Wanted,
        temperature: float,
        options: PipelineOptions,
        client: ClientOptions | None,
        state: Mapping[str, Any],
        version: int,
        loop: asyncio.AbstractEventLoop,
        pins: Mapping[str, str],
    ) -> None:
        self._backend, self._folder, self._prompts, self._sampling = backend, writer.folder, prompts, sampling
        self._targets, self._client_options = list(targets), client
        self._writer = writer
        self._router, self._wanted, self._temperature = router, wanted, temperature
        self.options = options
        self.version = version
        self._first = int(state.get("first", 0))
        self._trained: dict[int, int] = {int(n): int(step) for n, step in state.get("trained", {}).items()}
        """Step by batch: contained in the learner's weights, and not yet consumed in the log."""
        self._uses: dict[int, int] = {int(n): int(uses) for n, uses in state.get("uses", {}).items()}
        self._pins = {**pins, **state.get("pins", {})}
        self._batches: dict[int, Batch] = {}
        self._finished: deque[Entry] = deque()
        self._queue: deque[Entry] = deque()
        self._scoring: dict[str, Entry] = {}
        self._uncommitted: deque[Entry] = deque()
        self._out: dict[int, Batch] = {}
        """With the learner, or trained on and not yet consumed."""
        self._settled: set[int] = set()
        self.failures: deque[str] = deque(maxlen=10)
        """Why the last samples were unscorable."""
        self._ended = False
        self._error: BaseException | None = None
        self._counts = PipelineStats()
        self.lengths: list[tuple[int, bool]] = []
        self._loop = loop
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._writing = asyncio.Lock()  # one writer is for one thread at a time
        self._client = AsyncScoringClient(self._targets, self._client_options, pins=self._pins)
        await self._client.__aenter__()
        for stage in (self._generate(), self._seal(), self._score(), self._keep()):
            self._spawn(stage)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.__aexit__()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
        self.notify()

    # -- stages -------------------------------------------------------------------------------------------------

    async def _generate(self) -> None:
        """Submit batches, as far as there is room."""
        number = self._first
        while (prompts := await asyncio.to_thread(self._prompts, number)) is not None:
            size = len(prompts.prompts) * self.options.group_size
            since = self._loop.time()
            await self._until(partial(self._has_room, size))
            self._counts.held_back_s += self._loop.time() - since
            self._counts.begun += size
            batch = self._batches[number] = Batch(number, size, size, uses=self._uses.get(number, 0))
            self._spawn(self._follow(batch, prompts))
            number += 1
        self._ended = True
        self.notify()

    def _has_room(self, size: int) -> bool:
        there = sum(b.coming for b in self._batches.values()) + len(self._finished)
        return there == 0 or there + size <= self.options.generation

    async def _follow(self, batch: Batch, prompts: PromptBatch) -> None:
        """Take a cohort's rollouts as they finish. Those that were consumed before a restart do not come."""
        done: list[int] = []
        rollouts = self._backend.generate_async(
            prompts.prompts,
            self._sampling,
            group_size=self.options.group_size,
            seed=self.options.seed + batch.number,
            cohort=f"{self.options.name}/{batch.number}",
            metadata=prompts.metadata,
        )
        async for rollout in rollouts:
            batch.coming -= 1
            if batch.number in self._trained:
                done.append(rollout.id)  # the learner's weights contain it; only the log does not know
                continue
            batch.on_the_way += 1
            version = int(rollout.output.version_T[0]) if len(rollout.output) else None
            self._finished.append(
                Entry(batch.number, rollout, rollout.id, rollout.key, version, len(rollout.output), self._loop.time())
            )
            self.notify()
        if done:
            step = self._trained[batch.number]
            await asyncio.to_thread(self._backend.consumed, done, epoch=self.options.replay - 1, step=step)
            self._counts.consumed += len(done)
        batch.coming = 0
        self._settle(batch)
        self.notify()

    async def _seal(self) -> None:
        """Finished rollouts into the dataset, several to a commit."""
        while True:
            await self._until(lambda: bool(self._sealable()))
            await asyncio.sleep(self.options.seal_s)
            entries = self._sealable()
            samples = [
                routed(to_sample(e.rollout, self._backend.info, self._sampling), self._router)
                for e in entries
                if e.rollout is not None
            ]
            taken = {id(e) for e in entries}
            self._finished = deque(e for e in self._finished if id(e) not in taken)
            async with self._writing:
                sealed = await asyncio.to_thread(self._writer.seal, samples)
                there = await asyncio.to_thread(known, self._folder, set(sealed.present), self._wanted)
            self._counts.sealed += len(entries)
            for entry, sample in zip(entries, samples, strict=True):
                censored = entry.rollout is not None and entry.rollout.censored is not None
                entry.rollout = None
                entry.since_s = self._loop.time()
                mask = loss_mask(sample.segment_kinds)
                self._counts.sampled_tokens += int(mask.sum())
                if censored and not self.options.censored:
                    await self._drop(entry, "censored")
                    continue
                routes, complete = there.get(entry.key, (recorded(sample.teachers, sample.extras), frozenset[str]()))
                tasks = tasks_of(entry.key, sample.token_ids, mask, routes)
                missing = [t for t in tasks if t.teacher not in complete]
                if tasks:
                    entry.covered = int(np.logical_or.reduce([t.weights > 0 for t in tasks]).sum())
                if not tasks:
                    await self._drop(entry, "unscorable")
                elif missing:
                    entry.tasks = missing
                    self._queue.append(entry)
                else:
                    self._ready(entry)
            self.notify()

    def _sealable(self) -> list[Entry]:
        room = self.options.scoring - len(self._queue) - len(self._scoring)
        oldest = self._oldest()
        ordered = sorted(self._finished, key=lambda e: e.batch)
        return [e for i, e in enumerate(ordered) if i < room or e.batch == oldest]

    async def _score(self) -> None:
        """One long call of the client; items go in as there is room behind."""
        sent: dict[int, tuple[Entry, Task]] = {}
        count = 0

        async def items() -> Any:
            nonlocal count
            while True:
                await self._until(lambda: self._scorable() is not None)
                entry = self._scorable()
                if entry is None:
                    continue
                self._queue.remove(entry)
                if self._is_stale(entry):
                    await self._drop(entry, "stale")
                    continue
                entry.open_tasks = len(entry.tasks)
                self._scoring[entry.key] = entry
                for task in entry.tasks:
                    sent[count] = entry, task
                    count += 1
                    yield self._item(task)

        async with aclosing(self._client.score(items())) as outcomes:
            async for index, outcome in outcomes:
                entry, task = sent.pop(index)
                await self._answered(entry, task, outcome)

    async def _answered(self, entry: Entry, task: Task, outcome: Scores | RolloutWalError) -> None:
        if isinstance(outcome, Scores):
            entry.groups.update(task.columns(outcome, self._wanted))
        elif isinstance(outcome, _NOT_ITS_FAULT):
            raise outcome
        else:
            entry.tasks = []  # one of its scores will never come
            self.failures.append(f"{entry.key} under {task.teacher}: {outcome}")
        entry.open_tasks -= 1
        if entry.open_tasks:
            return
        del self._scoring[entry.key]
        if entry.tasks:
            self._uncommitted.append(entry)
        else:
            await self._drop(entry, "unscorable")
        self.notify()

    def _item(self, task: Task) -> ScoreItem:
        tokenizer = self._backend.info.tokenizer_digest
        expected = Provenance(task.teacher, tokenizer_digest=tokenizer)
        return task.item(self._wanted, temperature=self._temperature, expected=expected)

    def _scorable(self) -> Entry | None:
        if not self._queue:
            return None
        entry = min(self._queue, key=lambda e: e.batch)
        ready = sum(len(b.ready) for n, b in self._batches.items() if n not in self._out)
        waiting = ready + len(self._scoring) + len(self._uncommitted)
        return entry if waiting < self.options.scored or entry.batch == self._oldest() else None

    async def _keep(self) -> None:
        """Scores into the dataset, several to a commit. A rollout is ready when all of its teachers' are durable."""
        while True:
            await self._until(lambda: bool(self._uncommitted))
            await asyncio.sleep(self.options.commit_s)
            entries = list(self._uncommitted)
            groups: dict[str, dict[str, ColumnGroup]] = {}
            for entry in entries:
                for name, group in entry.groups.items():
                    groups.setdefault(name, {})[entry.key] = group
            async with self._writing:
                for name, columns in groups.items():
                    await asyncio.to_thread(self._writer.add_columns, name, columns)
            for entry in entries:
                self._uncommitted.remove(entry)
                entry.tasks, entry.groups = [], {}
                self._ready(entry)
            self.notify()

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def _ready(self, entry: Entry) -> None:
        batch = self._batches[entry.batch]
        entry.since_s = self._loop.time()
        self._counts.scored_tokens += entry.covered
        batch.ready.append(entry)
        batch.on_the_way -= 1

    async def _drop(self, entry: Entry, reason: str, *, waiting: bool = True) -> None:
        """It stays in the dataset, and will not be trained on: durable, so that it does not come again either."""
        batch = self._batches[entry.batch]
        await asyncio.to_thread(self._backend.release, [entry.id])
        batch.left_out[reason] += 1
        batch.on_the_way -= waiting
        setattr(self._counts, reason, getattr(self._counts, reason) + 1)
        if reason == "stale":
            self.lengths.append((entry.length, False))
        self._settle(batch)
        self.notify()

    def _settle(self, batch: Batch) -> None:
        """Forget a batch of which nothing is left to be trained on."""
        if not batch.complete or batch.ready or batch.number in self._out or batch.number not in self._batches:
            return
        del self._batches[batch.number]
        self._trained.pop(batch.number, None)
        self._uses.pop(batch.number, None)
        self._settled.add(batch.number)
        while self._first in self._settled:
            self._settled.remove(self._first)
            self._first += 1

    def _oldest(self) -> int | None:
        """The batch that the learner gets next."""
        return min((n for n in self._batches if n not in self._out), default=None)

    def _is_stale(self, entry: Entry) -> bool:
        lag = self.options.max_lag
        return lag is not None and entry.start_version is not None and entry.start_version < self.version - lag

    async def next_batch(self) -> tuple[Batch, list[str]] | None:
        while True:
            await self._until(lambda: self._deliverable() is not None or (self._ended and not self._pending()))
            batch = self._deliverable()
            if batch is None:
                return None
            for entry in [e for e in batch.ready if self._is_stale(e)]:
                batch.ready.remove(entry)
                await self._drop(entry, "stale", waiting=False)
            if not batch.ready:
                continue  # settled
            if batch.uses == 0:
                self.lengths += [(e.length, True) for e in batch.ready]
            batch.uses += 1
            self._out[batch.number] = batch
            return batch, sorted(e.key for e in batch.ready)

    def _pending(self) -> bool:
        return any(n not in self._out for n in self._batches)

    def _deliverable(self) -> Batch | None:
        """The next batch in order, if all of it is ready. One that is to be used again comes before later ones."""
        oldest = self._oldest()
        batch = self._batches[oldest] if oldest is not None else None
        return batch if batch is not None and batch.complete and batch.ready else None

    async def mark(self, number: int, step: int) -> dict[str, Any]:
        batch = self._out.get(number)
        if batch is None or number in self._trained:
            raise BadRequest(
                problem(
                    f"batch {number} is not with the learner",
                    consequence="Nothing was noted",
                    remedy="Call `trained` once for each batch that the pipeline handed out",
                )
            )
        if batch.uses >= self.options.replay:
            self._trained[number] = step
            self._uses.pop(number, None)
        else:
            self._uses[number] = batch.uses
            del self._out[number]
            self.notify()
        return {
            "first": self._first,
            "trained": {str(n): s for n, s in self._trained.items()},
            "uses": {str(n): u for n, u in self._uses.items()},
            "pins": dict(self._client.pins),
        }

    async def consume(self) -> None:
        for number, step in list(self._trained.items()):
            batch = self._out.get(number)
            if batch is None:
                continue  # of before the restart: `_follow` does it
            ids = [e.id for e in batch.ready]
            await asyncio.to_thread(self._backend.consumed, ids, epoch=batch.uses - 1, step=step)
            self._counts.consumed += len(ids)
            batch.ready.clear()
            del self._out[number]
            self._settle(batch)
        self.notify()

    async def look(self) -> PipelineStats:
        now = self._loop.time()
        ready = [e for b in self._batches.values() if b.number not in self._out for e in b.ready]
        queued = [*self._queue, *self._scoring.values(), *self._uncommitted]
        c = self._counts
        values = {name: getattr(c, name) for name in PipelineStats.__slots__}
        values |= {
            "generating": sum(b.coming for b in self._batches.values()),
            "finished": len(self._finished),
            "queued": len(self._queue),
            "scoring": len(self._scoring) + len(self._uncommitted),
            "scored": len(ready),
            "oldest_queued_s": max((now - e.since_s for e in queued), default=0.0),
            "oldest_scored_s": max((now - e.since_s for e in ready), default=0.0),
        }
        return PipelineStats(**values)

    # -- waiting ------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self._error is not None:
                raise self._error
            await self._changed.wait()
