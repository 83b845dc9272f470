"""The stages between prompts and the learner.

    prompts ─▶ engine ─▶ sealed in the dataset ─▶ scored ─▶ learner ─▶ consumed
               (log)     (metadata, tokens)       (column groups)      (log)

A batch is a closed cohort: the learner gets batches in the order in which they were submitted, each with all its
rollouts, and never the first ones that happen to be ready. Taking those would train on short rollouts first and drop
long ones as stale.

Killed anywhere, it starts again from what is durable: rollouts that were not consumed come out of the log again under
their keys, those that are in the dataset are not sealed twice, and those that have scores are not scored twice.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.dataset import ColumnGroup, Dataset, DatasetWriter, Provenance, Sample, loss_mask, open_dataset
from rollout_wal.dataset.freshness import removed_by_length
from rollout_wal.delivery import to_sample
from rollout_wal.params import SamplingParams

from ..client import AsyncScoringClient, ClientOptions
from ..errors import Overloaded, Unreachable
from ..items import ScoreItem, Scores, Wanted
from ..routing import Router, recorded, routed
from ..tasks import Task, groups_of, tasks_of
from .batch import ScoredBatch, read_batch
from .options import PipelineOptions, PromptBatch

_T = TypeVar("_T")
#: What is no fault of a sample: the pipeline stops rather than drop it.
_NOT_ITS_FAULT = (Unreachable, Overloaded)


@dataclass(slots=True, eq=False)
class _Entry:
    """A rollout on its way."""

    batch: int
    rollout: FinishedRollout | None
    id: int
    key: str
    start_version: int | None
    length: int
    since_s: float
    tasks: list[Task] = field(default_factory=list)
    groups: dict[str, ColumnGroup] = field(default_factory=dict)
    open_tasks: int = 0
    covered: int = 0
    """Sampled tokens that some teacher scores."""


@dataclass(slots=True, eq=False)
class _Batch:
    """A cohort on its way."""

    number: int
    size: int
    coming: int
    """Rollouts that the log has not handed out yet."""
    on_the_way: int = 0
    """Handed out, and neither scored nor dropped."""
    ready: list[_Entry] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    uses: int = 0

    @property
    def complete(self) -> bool:
        return self.coming == 0 and self.on_the_way == 0


@dataclass(slots=True)
class PipelineStats:
    """Counts of rollouts, ages in seconds."""

    generating: int = 0
    finished: int = 0
    queued: int = 0
    scoring: int = 0
    scored: int = 0
    begun: int = 0
    sealed: int = 0
    consumed: int = 0
    stale: int = 0
    censored: int = 0
    unscorable: int = 0
    sampled_tokens: int = 0
    scored_tokens: int = 0
    held_back_s: float = 0.0
    """How long the engine was given no new prompts because there was no room behind it."""
    oldest_queued_s: float = 0.0
    """How long the oldest rollout has waited for scores."""
    oldest_scored_s: float = 0.0
    """How long the oldest one has waited for the learner."""

    @property
    def score_coverage(self) -> float | None:
        """Tokens with a score of those that were sampled and left scoring; None before there are any."""
        return self.scored_tokens / self.sampled_tokens if self.sampled_tokens else None


class Pipeline(AbstractContextManager["Pipeline"]):
    """Joins an engine, scoring servers and a learner. Use as a context manager around the training loop.

        with RolloutBackend(...) as backend, Pipeline(backend, "data", ["host:7070"], prompts, sampling, ...) as pipe:
            for batch in pipe:
                train(batch)
                save_checkpoint(model, optimizer, pipe.trained(batch, step))
                pipe.commit()
                pipe.update_weights(folder, version)

    What `trained` returns belongs into the same checkpoint as the weights. A checkpoint need not be made at every step:
    batches that were trained on since the last one come again after a crash, as its weights have not seen them.

    Args:
        backend: running.
        folder: the dataset that it is delivered to, and scored in.
        targets: host:port of scoring servers.
        prompts: the batch of a number, from 0; None ends the sequence. The same number must always give the same
            batch: it is asked for again after a restart.
        sampling: of all rollouts.
        router: which teachers score a rollout.
        wanted: what they compute; see `scoring.tasks` for the columns.
        temperature: that teachers' logits are divided by.
        state: of the checkpoint that the learner goes on from.
        version: of the policy that is in force.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        folder: str | Path,
        targets: Sequence[str],
        prompts: Callable[[int], PromptBatch | None],
        sampling: SamplingParams,
        *,
        router: Router,
        wanted: Wanted | None = None,
        temperature: float = 1.0,
        options: PipelineOptions | None = None,
        client: ClientOptions | None = None,
        state: Mapping[str, Any] | None = None,
        version: int = 0,
    ) -> None:
        self._backend, self._folder, self._prompts, self._sampling = backend, Path(folder), prompts, sampling
        self._targets, self._client_options = list(targets), client
        self._router, self._wanted, self._temperature = router, wanted or Wanted(), temperature
        self.options = options or PipelineOptions()
        self.version = version
        state = state or {}
        self._first = int(state.get("first", 0))
        self._trained: dict[int, int] = {int(n): int(step) for n, step in state.get("trained", {}).items()}
        """Step by batch: contained in the learner's weights, and not yet consumed in the log."""
        self._uses: dict[int, int] = {int(n): int(uses) for n, uses in state.get("uses", {}).items()}
        self._pins: dict[str, str] = dict(state.get("pins", {}))
        self._batches: dict[int, _Batch] = {}
        self._finished: deque[_Entry] = deque()
        self._queue: deque[_Entry] = deque()
        self._scoring: dict[str, _Entry] = {}
        self._uncommitted: deque[_Entry] = deque()
        self._out: dict[int, _Batch] = {}
        """With the learner, or trained on and not yet consumed."""
        self._settled: set[int] = set()
        self.failures: deque[str] = deque(maxlen=10)
        """Why the last samples were unscorable."""
        self._ended = False
        self._error: BaseException | None = None
        self._counts = PipelineStats()
        self._lengths: list[tuple[int, bool]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pipeline", daemon=True)
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Pipeline:
        self._writer = DatasetWriter(
            self._folder,
            writer_id="pipeline",
            check_fence=self._backend.check_fence,
            default_compression="zstd",
        )
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        """Stop. What was not consumed comes again with the next start."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _start(self) -> None:
        self._writing = asyncio.Lock()  # one writer is for one thread at a time
        self._client = AsyncScoringClient(self._targets, self._client_options, pins=self._pins)
        await self._client.__aenter__()
        for stage in (self._generate(), self._seal(), self._score(), self._keep()):
            self._spawn(stage)

    async def _stop(self) -> None:
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
        self._notify()

    # -- the learner's side -------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ScoredBatch]:
        """Batches in order, as they are complete; ends with the prompts.

        Raises:
            Whatever stopped a stage: no server, a full disk, a dead backend. Everything that was acknowledged is
            durable, and the next start goes on with it.
        """
        while (found := self._call(self._next())) is not None:
            batch, keys = found
            yield read_batch(self._folder, batch.number, batch.uses, keys, batch.size, batch.left_out)

    def trained(self, batch: ScoredBatch, step: int) -> dict[str, Any]:
        """The learner's weights contain the batch, as of optimizer step `step`.

        Returns:
            What the checkpoint with these weights must hold, in plain types: `state` of the next start.
        """
        return self._call(self._mark(batch.number, step))

    def commit(self) -> None:
        """The checkpoint that holds the state that `trained` returned last is durable: what it contains is consumed.

        Durable when this returns: none of it ever comes again. After a crash before it, the state says the same.
        """
        self._call(self._consume())

    def update_weights(self, source: Any, version: int) -> str:
        """As `RolloutBackend.update_weights`; what is fresh is counted from the new version."""
        digest = self._backend.update_weights(source, version)
        self.version = version
        self._loop.call_soon_threadsafe(self._notify)
        return digest

    def stats(self) -> PipelineStats:
        """What is where, now."""
        return self._call(self._look())

    def removed_by_length(self) -> Any:
        """What the freshness window removed, by response length: see `rollout_wal.dataset.freshness`."""
        pairs = list(self._lengths)
        return removed_by_length(np.array([n for n, _ in pairs], np.int64), np.array([k for _, k in pairs], np.bool_))

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
            batch = self._batches[number] = _Batch(number, size, size, uses=self._uses.get(number, 0))
            self._spawn(self._follow(batch, prompts))
            number += 1
        self._ended = True
        self._notify()

    def _has_room(self, size: int) -> bool:
        there = sum(b.coming for b in self._batches.values()) + len(self._finished)
        return there == 0 or there + size <= self.options.generation

    async def _follow(self, batch: _Batch, prompts: PromptBatch) -> None:
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
                _Entry(batch.number, rollout, rollout.id, rollout.key, version, len(rollout.output), self._loop.time())
            )
            self._notify()
        if done:
            step = self._trained[batch.number]
            await asyncio.to_thread(self._backend.consumed, done, epoch=self.options.replay - 1, step=step)
            self._counts.consumed += len(done)
        batch.coming = 0
        self._settle(batch)
        self._notify()

    async def _seal(self) -> None:
        """Finished rollouts into the dataset, several to a commit."""
        while True:
            await self._until(lambda: bool(self._sealable()))
            await asyncio.sleep(self.options.seal_s)
            entries = self._sealable()
            samples = [
                self._routed(to_sample(e.rollout, self._backend.info, self._sampling))
                for e in entries
                if e.rollout is not None
            ]
            taken = {id(e) for e in entries}
            self._finished = deque(e for e in self._finished if id(e) not in taken)
            async with self._writing:
                sealed = await asyncio.to_thread(self._writer.seal, samples)
                there = await asyncio.to_thread(self._known, set(sealed.present))
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
            self._notify()

    def _sealable(self) -> list[_Entry]:
        room = self.options.scoring - len(self._queue) - len(self._scoring)
        oldest = self._oldest()
        ordered = sorted(self._finished, key=lambda e: e.batch)
        return [e for i, e in enumerate(ordered) if i < room or e.batch == oldest]

    def _routed(self, sample: Sample) -> Sample:
        return routed(sample, self._router)

    def _known(self, keys: set[str]) -> dict[str, tuple[Any, frozenset[str]]]:
        """Routes and scored teachers of samples that were sealed before a restart: the dataset says, not the router."""
        if not keys:
            return {}
        dataset = open_dataset(self._folder, check_files=False)
        found: dict[str, tuple[Any, frozenset[str]]] = {}
        scored: dict[str, set[str]] = {}
        for row in dataset.metadata(["sample", "teachers", "extras"]).to_pylist():
            if row["sample"] not in keys:
                continue
            routes = recorded(row["teachers"], json.loads(row["extras"] or "{}"))
            for route in routes:
                if route.teacher not in scored:
                    scored[route.teacher] = self._scored_under(dataset, route.teacher)
            complete = frozenset(r.teacher for r in routes if row["sample"] in scored[r.teacher])
            found[row["sample"]] = routes, complete
        return found

    def _scored_under(self, dataset: Dataset, teacher: str) -> set[str]:
        groups = groups_of(teacher, self._wanted)
        sets = [dataset.keys_with(name) if name in dataset.groups else set() for name in groups]
        return set.intersection(*sets) if sets else set()

    async def _score(self) -> None:
        """One long call of the client; items go in as there is room behind."""
        sent: dict[int, tuple[_Entry, Task]] = {}
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

        async for index, outcome in self._client.score(items()):
            entry, task = sent.pop(index)
            if isinstance(outcome, Scores):
                entry.groups.update(task.columns(outcome, self._wanted))
            elif isinstance(outcome, _NOT_ITS_FAULT):
                raise outcome
            else:
                entry.tasks = []  # one of its scores will never come
                self.failures.append(f"{entry.key} under {task.teacher}: {outcome}")
            entry.open_tasks -= 1
            if entry.open_tasks:
                continue
            del self._scoring[entry.key]
            if entry.tasks:
                self._uncommitted.append(entry)
            else:
                await self._drop(entry, "unscorable")
            self._notify()

    def _item(self, task: Task) -> ScoreItem:
        tokenizer = self._backend.info.tokenizer_digest
        expected = Provenance(task.teacher, tokenizer_digest=tokenizer)
        return task.item(self._wanted, temperature=self._temperature, expected=expected)

    def _scorable(self) -> _Entry | None:
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
            self._notify()

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def _ready(self, entry: _Entry) -> None:
        batch = self._batches[entry.batch]
        entry.since_s = self._loop.time()
        self._counts.scored_tokens += entry.covered
        batch.ready.append(entry)
        batch.on_the_way -= 1

    async def _drop(self, entry: _Entry, reason: str, *, waiting: bool = True) -> None:
        """It stays in the dataset, and will not be trained on: durable, so that it does not come again either."""
        batch = self._batches[entry.batch]
        await asyncio.to_thread(self._backend.release, [entry.id])
        batch.left_out[reason] += 1
        batch.on_the_way -= waiting
        setattr(self._counts, reason, getattr(self._counts, reason) + 1)
        if reason == "stale":
            self._lengths.append((entry.length, False))
        self._settle(batch)
        self._notify()

    def _settle(self, batch: _Batch) -> None:
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

    def _is_stale(self, entry: _Entry) -> bool:
        lag = self.options.max_lag
        return lag is not None and entry.start_version is not None and entry.start_version < self.version - lag

    async def _next(self) -> tuple[_Batch, list[str]] | None:
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
                self._lengths += [(e.length, True) for e in batch.ready]
            batch.uses += 1
            self._out[batch.number] = batch
            return batch, sorted(e.key for e in batch.ready)

    def _pending(self) -> bool:
        return any(n not in self._out for n in self._batches)

    def _deliverable(self) -> _Batch | None:
        """The next batch in order, if all of it is ready. One that is to be used again comes before later ones."""
        oldest = self._oldest()
        batch = self._batches[oldest] if oldest is not None else None
        return batch if batch is not None and batch.complete and batch.ready else None

    async def _mark(self, number: int, step: int) -> dict[str, Any]:
        batch = self._out[number]
        if batch.uses >= self.options.replay:
            self._trained[number] = step
            self._uses.pop(number, None)
        else:
            self._uses[number] = batch.uses
            del self._out[number]
            self._notify()
        return {
            "first": self._first,
            "trained": {str(n): s for n, s in self._trained.items()},
            "uses": {str(n): u for n, u in self._uses.items()},
            "pins": dict(self._client.pins),
        }

    async def _consume(self) -> None:
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
        self._notify()

    async def _look(self) -> PipelineStats:
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

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self._error is not None:
                raise self._error
            await self._changed.wait()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
