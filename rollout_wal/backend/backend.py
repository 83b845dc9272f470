"""RolloutBackend: rollouts that survive their workers, and this process.

    with RolloutBackend("models/tiny", "runs/wal", workers=2) as backend:
        for rollout in backend.generate(prompts, SamplingParams(max_tokens=512), group_size=8):
            ...
            backend.consumed([rollout.id], epoch=0, step=step)

Kill any of it at any time and start it again: the same rollouts go on, and come out once.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import signal
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import msgpack
from numpy.typing import ArrayLike

from ..engines.base import EngineInfo
from ..episode import Episodes, check_episodes
from ..errors import BadInput, LogError, problem
from ..kv.snapshots import KvConfig
from ..log.policy import SyncPolicy
from ..params import SamplingParams
from ..prompts import check_prompt, cohort_digest, rollout_seed
from ..wal import Balance, CohortCount, JobMark, RolloutWal
from .coordinator import Coordinator, Stats
from .finished import FinishedRollout
from .outlet import Item, Outlet
from .poison import PoisonRule
from .progress import Progress
from .spec import EngineSpec
from .weights import drop_weights, save_weights

Noise = Literal["position", "attempt"]


class RolloutBackend(AbstractContextManager["RolloutBackend"]):
    """What a trainer embeds. Thread-safe.

    Args:
        engine: a local model folder (for the embedded engine), or an EngineSpec.
        path: the directory of the logs. The same directory continues the same job.
        workers: worker processes, one engine and one engine log each.
        slots: rollouts that a worker runs at once (the engine's max_batch is set to it).
        segment_bytes: size of the files that a log consists of; also about the least that a log takes on disk.
        policy: when the logs are synced.
        first_version: policy version of the model folder's weights, in a new job.
        grace_s: how long workers may take to stop in good order.
        poison: when to give a rollout up.
        take_over: fence a live owner of `path` instead of refusing.
        kv: where KV snapshots are kept, or a KvConfig; "auto": beside the logs, in `path`/kv; None: resumed rollouts
            are prefilled.
        episodes: the tools that rollouts may call, and who reads their calls.
        witness: path of a Unix socket that each worker tells every durable frame, before anybody else hears of it.

    Raises (on entering, or `start`):
        LogOwned, LogDamaged, LogTooNew: see `log.recovery`.
        ArchitectureMismatch, TokenizerMismatch, UndeclaredWeights: `path` holds a job of another model.
        WorkerFailed: no worker could be started.
    """

    def __init__(
        self,
        engine: EngineSpec | str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        workers: int = 1,
        slots: int = 32,
        segment_bytes: int = 64 << 20,
        policy: SyncPolicy | None = None,
        first_version: int = 0,
        grace_s: float = 10.0,
        poison: PoisonRule | None = None,
        take_over: bool = False,
        witness: str | None = None,
        kv: KvConfig | str | os.PathLike[str] | None = None,
        episodes: Episodes | None = None,
    ) -> None:
        if workers < 1 or slots < 1:
            raise BadInput(
                problem(
                    f"workers={workers} and slots={slots} must both be at least 1",
                    consequence="Nothing was started",
                    remedy="Pass positive numbers",
                )
            )
        spec = engine if isinstance(engine, EngineSpec) else EngineSpec(os.fspath(engine), options={"max_batch": slots})
        if Path(spec.model).is_dir():  # its name is logged, and read back from another working directory
            spec = replace(spec, model=str(Path(spec.model).resolve()))
        self._spec = spec
        self._path = Path(path).resolve()
        self._segment_bytes = segment_bytes
        self._policy = policy
        self._take_over = take_over
        self._grace_s = grace_s
        self._options: dict[str, Any] = {
            "workers": workers,
            "slots": slots,
            "first_version": first_version,
            "poison": poison or PoisonRule(),
            "witness": witness,
            "grace_s": grace_s,
            "take_over": take_over,
            "kv": self._kv_config(kv),
            "episodes": episodes,
        }
        self._coordinator: Coordinator | None = None
        self._wal: RolloutWal | None = None
        self._named: set[str] = set()

    def _kv_config(self, kv: KvConfig | str | os.PathLike[str] | None) -> KvConfig | None:
        if kv is None or isinstance(kv, KvConfig):
            return kv
        folder = self._path / "kv" if kv == "auto" else Path(kv).resolve()
        # Half of the grace time: the rest is for the logs, and for the engine to close.
        return KvConfig(str(folder), grace_s=self._grace_s / 2)

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> RolloutBackend:
        """Open the job, start the workers, and go on with what was in flight. Returns when one worker is ready."""
        if self._coordinator is not None:
            return self
        try:
            self._wal = RolloutWal.open(
                self._path, segment_bytes=self._segment_bytes, policy=self._policy, take_over=self._take_over
            )
            check_episodes(self._wal.in_flight(), self._options["episodes"])
            coordinator = Coordinator(self._wal, self._spec, **self._options)
            coordinator.start()
            self._coordinator = coordinator
            coordinator.ready.wait()
            if coordinator.error is not None:
                raise coordinator.error
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Preempt the workers in good order. What is in flight stays in the log, and goes on with the next start."""
        coordinator, self._coordinator = self._coordinator, None
        wal, self._wal = self._wal, None
        failed = False
        if coordinator is not None:
            coordinator.post(coordinator.shut)
            coordinator.join()
            failed = coordinator.error is not None
        if wal is not None:
            try:
                wal.close()
            except LogError:
                if not failed:  # else everybody has been told why
                    raise

    def __enter__(self) -> RolloutBackend:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- rollouts -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int = 0,
        cohort: str | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        noise: Noise = "position",
        progress: bool = False,
    ) -> Iterator[FinishedRollout]:
        """Sample `group_size` completions of each prompt; yield them in order of completion.

        The rollouts of one call are a closed cohort: all of them begin before any token is sampled, and each comes
        out exactly once, finished or censored. None comes out before it is durable. Called again after a crash, with
        the same arguments, the same cohort goes on: what was consumed does not come again, what was delivered and not
        consumed does. Closing the iterator aborts nothing.

        Args:
            prompts: token ids, one sequence each.
            sampling: how to draw, for all of them.
            seed: with cohort-independent indexes it determines every rollout's seed, and so every token.
            cohort: a name. Without one, calls with equal arguments are told apart by their order in this process.
            metadata: one mapping per prompt, logged and handed out with each of its rollouts.
            noise: "position": keyed by seed and position; a resume repeats no draw and lost tokens come back the
                same. "attempt": drawn afresh at each resume; for measurements of bias, which keyed noise would hide.
            progress: show a progress bar on standard error.

        Raises:
            BadPrompt, BadSampling, CohortMismatch: nothing was begun.
            LogPoisoned, LogFenced, WorkerFailed: the backend has stopped; everything acknowledged is in the log.
        """
        items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        outlet = Outlet(items.put)
        number = self._submit(outlet, prompts, sampling, group_size, seed, cohort, metadata, noise)
        return self._drain(outlet, number, items, len(prompts) * group_size, progress)

    async def generate_async(
        self,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int = 0,
        cohort: str | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        noise: Noise = "position",
    ) -> AsyncIterator[FinishedRollout]:
        """The asynchronous twin of `generate`. The event loop is never blocked."""
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()
        outlet = Outlet(lambda item: _to_loop(loop, items, item))
        c = self._running()
        number = await asyncio.to_thread(
            self._submit, outlet, prompts, sampling, group_size, seed, cohort, metadata, noise
        )
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            c.post(lambda: c.detach(number, outlet))

    def again(self, cohort: str) -> Iterator[FinishedRollout]:
        """What is left of a cohort that is in the log: all of it that was not consumed or released, as it finishes.

        Raises:
            BadInput: there is no such cohort.
        """
        c = self._running()
        items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        outlet = Outlet(items.put)

        def attach() -> tuple[int, int]:
            state = c.wal.state.cohort_named(cohort)
            if state is None:
                raise BadInput(
                    problem(
                        f"the log has no cohort {cohort!r}",
                        consequence="Nothing was done",
                        remedy="Use a name that cohorts() lists",
                    )
                )
            c.attach(state.record.cohort, outlet)
            return state.record.cohort, outlet.expected

        number, expected = c.call(attach)
        return self._drain(outlet, number, items, expected, progress=False)

    def consumed(self, rollouts: Iterable[int], *, epoch: int, step: int, release: bool = True) -> None:
        """Optimizer step `step` used them: they are never delivered again. Durable when this returns.

        Args:
            release: give back the space of their tokens too.

        Raises:
            UnknownRollout: not in the log, or released before.
            BadInput: one of them was not delivered; nothing was changed.
        """
        c, ids = self._running(), list(rollouts)
        c.call(lambda: c.consume(ids, epoch, step, release))

    def release(self, rollouts: Iterable[int]) -> None:
        """They are safe elsewhere (in a dataset): the log need not keep them, and does not deliver them again.

        Raises:
            UnknownRollout: not in the log, or released before.
            BadInput: one of them was not delivered; nothing was changed.
        """
        c, ids = self._running(), list(rollouts)
        c.call(lambda: c.release(ids))

    def abort(self, rollout: int, *, reason: str = "abort") -> None:
        """Give one up. It is delivered as censored, with what it had. One that is over already is left as it is.

        Raises:
            UnknownRollout: not in the log, or released before.
        """
        c = self._running()
        c.call(lambda: c.abort(rollout, reason))

    def update_weights(self, source: str | os.PathLike[str] | Mapping[str, Any], version: int) -> str:
        """Replace the weights of every worker at a step boundary; returns their digest.

        The version is durable before any token of it is sampled. Killed at any point, every worker is wholly on one
        version, and a resume loads the logged one: keep the folder until a later version is in force.

        Args:
            source: a model folder, or tensors by parameter name, which are then saved under the job's directory, for
                as long as they are in force.
            version: above the one in force. The one in force is accepted again if the weights are the same: a caller
                that died may not know how far it had come.

        Raises:
            ArchitectureMismatch, BadInput, BackendError: the old weights stay in force everywhere.
        """
        c, version = self._running(), int(version)
        c.check_version(version)
        saved = self._path / "weights"
        if isinstance(source, Mapping):
            source = save_weights(source, saved, version, like=self._spec.model)
        folder = str(Path(source).resolve())
        digest = c.call(lambda: c.begin_update(version, folder)).result()
        policy = c.wal.state.policy
        assert policy is not None
        drop_weights(saved, policy.version, keep=policy.source)
        return digest

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Which engine samples."""
        info = self._running().wal.info
        assert info is not None
        return info

    @property
    def stats(self) -> Stats:
        """Counters; they go on changing."""
        return self._running().stats

    def check_fence(self) -> None:
        """Raises LogFenced if another process has taken this job over: what it acknowledges must not be committed."""
        self._running().wal.log.fence.check()

    def balance(self) -> Balance:
        """Where every rollout of this job is: begun = delivered + in flight + censored."""
        c = self._running()
        return c.call(c.wal.balance)

    @property
    def mark(self) -> JobMark:
        """Which job this is, and how far its log has come: what a checkpoint writes down."""
        c = self._running()
        return c.call(lambda: JobMark(c.wal.log.writer.segment.log_id.hex(), c.wal.log.writer.durable_lsn))

    @property
    def policy_version(self) -> int:
        """The policy version in force."""
        c = self._running()
        policy = c.call(lambda: c.wal.state.policy)
        assert policy is not None
        return policy.version

    def cohorts(self) -> dict[str, CohortCount]:
        """Every cohort of this job by name, those included that are wholly used."""
        c = self._running()
        return c.call(c.wal.cohorts)

    def in_flight(self, cohort: str) -> list[int]:
        """Rollouts of a cohort that are neither finished nor censored."""
        c = self._running()
        return c.call(
            lambda: [r.id for r in c.wal.in_flight() if c.wal.state.cohorts[r.begin.cohort].record.name == cohort]
        )

    def members(self, cohort: str) -> dict[int, int]:
        """Rollout ids by index: the members of a cohort that have begun and were neither consumed nor released."""
        c = self._running()

        def find() -> dict[int, int]:
            state = c.wal.state.cohort_named(cohort)
            number = state.record.cohort if state is not None else -1
            of_cohort = (r for r in c.wal.state.rollouts.values() if r.begin.cohort == number)
            return {r.begin.index: r.id for r in of_cohort if r.consumed is None}

        return c.call(find)

    def worker_pids(self) -> dict[str, int]:
        """Process ids by worker name."""
        c = self._running()
        return c.call(c.worker_pids)

    def worker_steps(self) -> dict[str, tuple[int, int]]:
        """By worker name: how often it was started, and its engine steps since."""
        c = self._running()
        return c.call(c.worker_steps)

    def kill_worker(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a worker, to see what happens then."""
        c = self._running()
        c.call(lambda: c.kill(name, number))

    # -- inside -------------------------------------------------------------------------------------------------

    def _running(self) -> Coordinator:
        if self._coordinator is None:
            raise BadInput(
                problem(
                    "the backend is not running",
                    consequence="Nothing was done",
                    remedy="Use it as a context manager, or call start() first",
                )
            )
        return self._coordinator

    def _submit(
        self,
        outlet: Outlet,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        group_size: int,
        seed: int,
        cohort: str | None,
        metadata: Sequence[Mapping[str, Any]] | None,
        noise: Noise,
    ) -> int:
        """Begin what has not begun, durably, and attach the outlet. Returns the cohort's number.

        Whatever could be wrong is found before anything is logged.
        """
        c = self._running()
        size = len(prompts) * group_size
        if size < 1 or group_size < 1 or (metadata is not None and len(metadata) != len(prompts)):
            raise BadInput(
                problem(
                    f"{len(prompts)} prompts, group_size {group_size}, "
                    f"{len(metadata) if metadata is not None else 'no'} metadata entries",
                    consequence="Nothing was begun",
                    remedy="Pass at least one prompt, a group size of at least 1, and one metadata entry per prompt",
                )
            )
        if noise not in get_args(Noise) or not -(1 << 63) <= seed < 1 << 64:
            raise BadInput(
                problem(
                    f"noise={noise!r} with seed {seed}",
                    consequence="Nothing was begun",
                    remedy=f"Use one of {list(get_args(Noise))} and a seed of at most 64 bits",
                )
            )
        checked = [check_prompt(p, c.wal.info) for p in prompts]
        plain = [_plain(m) for m in metadata] if metadata is not None else None
        episodes: Episodes | None = self._options["episodes"]
        turns = episodes.record() if episodes is not None else {}
        if sampling.stop or turns.get("stop"):
            c.load_tokenizer()
        digest = cohort_digest(checked, sampling, group_size=group_size, seed=seed, noise=noise, turns=turns)

        def begin() -> int:
            name = cohort if cohort is not None else self._unnamed(digest)
            state = c.wal.begin_cohort(name, digest, size)
            number = state.record.cohort
            # A crash in the middle of this loop leaves some begun and none of the others known: they begin now.
            begun = {r.begin.index for r in c.wal.state.rollouts.values() if r.begin.cohort == number}
            fresh = [
                c.wal.begin(
                    checked[index // group_size],
                    sampling,
                    seed=rollout_seed(seed, index),
                    noise=noise,
                    cohort=state,
                    index=index,
                    group=f"{name}/{index // group_size}",
                    metadata=plain[index // group_size] if plain is not None else None,
                    turns=turns,
                )
                for index in range(0 if not state.complete else size, size)
                if index not in begun and index not in state.released_members
            ]
            c.wal.wait_durable()
            c.enqueue(fresh)
            c.attach(number, outlet)
            return number

        return c.call(begin)

    def _unnamed(self, digest: str) -> str:
        """Name a cohort whose caller did not: the k-th call with these contents is the k-th not fully used cohort."""
        state = self._running().wal.state
        for ordinal in itertools.count():
            name = f"{digest}.{ordinal}"
            known = state.cohort_named(name)
            used = 0
            if known is not None:
                members = (r for r in state.rollouts.values() if r.begin.cohort == known.record.cohort)
                used = known.released + sum(r.consumed is not None for r in members)
            if name not in self._named and (known is None or used < known.record.size):
                break
        self._named.add(name)
        return name

    def _drain(
        self, outlet: Outlet, number: int, items: queue.SimpleQueue[Item], total: int, progress: bool
    ) -> Iterator[FinishedRollout]:
        c = self._running()
        bar: AbstractContextManager[Progress | None] = (
            Progress(c.stats, total, already=total - outlet.expected) if progress else nullcontext()
        )
        try:
            with bar as shown:
                while True:
                    try:
                        item = items.get(timeout=0.25 if shown is not None else None)
                    except queue.Empty:
                        if shown is not None:
                            shown.refresh()
                        continue
                    if item is None:
                        return
                    if isinstance(item, BaseException):
                        raise item
                    if shown is not None:
                        shown.advance()
                    yield item
        finally:
            # Not awaited: the garbage collector may close this iterator on any thread.
            c.post(lambda: c.detach(number, outlet))


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it will be read back from the log."""
    try:
        plain: dict[str, Any] = msgpack.unpackb(msgpack.packb(dict(metadata)), strict_map_key=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(
            problem(
                f"the metadata {metadata!r:.200} cannot be logged: {error}",
                consequence="Nothing was begun",
                remedy="Use strings, numbers, booleans, None, bytes, and lists and mappings of them",
            )
        ) from error
    return plain


def _to_loop(loop: asyncio.AbstractEventLoop, items: asyncio.Queue[Item], item: Item) -> None:
    loop.call_soon_threadsafe(items.put_nowait, item)
