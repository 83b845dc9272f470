"""RolloutBackend: rollouts that survive their workers, and this process.

    with RolloutBackend("models/tiny", "runs/wal", workers=2) as backend:
        for rollout in backend.generate(prompts, SamplingParams(max_tokens=512), group_size=8):
            ...
            backend.consumed([rollout.id], epoch=0, step=step)

Kill any of it at any time and start it again: the same rollouts go on, and come out once.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from ..engines.base import EngineInfo
from ..episode import Episodes, check_episodes
from ..errors import BadInput, LogError, problem
from ..kv.snapshots import KvConfig
from ..log.policy import SyncPolicy
from ..params import SamplingParams
from ..provenance import check_follows
from ..records import Policy
from ..wal import Balance, CohortCount, JobMark, RolloutWal
from .arguments import rollout_ids, whole
from .coordinator import Coordinator
from .finished import FinishedRollout
from .outlet import Drain, Item, Outlet
from .poison import PoisonRule
from .progress import Progress
from .spec import EngineSpec
from .stats import Stats
from .submission import Names, Noise, Submission
from .weights import drop_weights, save_weights


class RolloutBackend(AbstractContextManager["RolloutBackend"]):
    """What a trainer embeds. Thread-safe.

    Args:
        engine: a local model folder (for the embedded engine), or an EngineSpec.
        path: the directory of the logs. The same directory continues the same job.
        workers: worker processes, one engine and one engine log each.
        slots: rollouts that a worker runs at once. The embedded engine's max_batch is set to it; with an EngineSpec,
            give its options the same number.
        devices: what each worker sees of the accelerators, one entry per worker, as CUDA_VISIBLE_DEVICES has it: "0",
            or "0,1" for an engine on two. None: all of them see what this process sees.
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
        devices: Sequence[str] | None = None,
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
        if devices is not None and (isinstance(devices, str) or len(devices) != workers):
            raise BadInput(
                problem(
                    f"devices={devices!r} for {workers} workers",
                    consequence="Nothing was started",
                    remedy='Pass one entry per worker: devices=["0", "1"] for two workers with one device each',
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
            "devices": None if devices is None else [str(d) for d in devices],
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
        self._names = Names()

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
        seed: int | None = None,
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
            seed: with the index in the cohort it determines every rollout's noise, and so every token; calls with the
                same seed draw the same noise. None: the cohort's name takes its place, so that no two cohorts do.
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
        self._submit(outlet, prompts, sampling, group_size, seed, cohort, metadata, noise)
        total = len(prompts) * group_size
        shown = Progress(self.stats, total, already=total - outlet.expected) if progress else None
        return self._drain(outlet, items, shown=shown)

    async def generate_async(
        self,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int | None = None,
        cohort: str | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        noise: Noise = "position",
    ) -> AsyncIterator[FinishedRollout]:
        """The asynchronous twin of `generate`. The event loop is never blocked."""
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()
        outlet = Outlet(lambda item: _to_loop(loop, items, item))
        c = self._running()
        try:
            await asyncio.to_thread(self._submit, outlet, prompts, sampling, group_size, seed, cohort, metadata, noise)
            while (item := await items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            # Also when it was cancelled while it still submitted, which goes on in its thread.
            c.post(lambda: c.handover.detach(outlet))

    def again(self, cohort: str) -> Iterator[FinishedRollout]:
        """What is left of a cohort that is in the log: all of it that was not consumed or released, as it finishes.

        Raises:
            BadInput: there is no such cohort.
        """
        c = self._running()
        items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        outlet = Outlet(items.put)

        def attach() -> None:
            state = c.wal.state.cohort_named(cohort)
            if state is None:
                raise BadInput(
                    problem(
                        f"the log has no cohort {cohort!r}",
                        consequence="Nothing was done",
                        remedy="Use a name that cohorts() lists",
                    )
                )
            c.handover.attach(state.record.cohort, outlet)

        c.call(attach)
        return self._drain(outlet, items)

    def consumed(self, rollouts: Iterable[int], *, epoch: int, step: int, release: bool = True) -> None:
        """Optimizer step `step` used them: they are never delivered again. Durable when this returns.

        Args:
            release: give back the space of their tokens too.

        Raises:
            UnknownRollout: not in the log, or released before.
            BadInput: one of them was not delivered, or a number is none; nothing was changed.
        """
        c, ids = self._running(), rollout_ids(rollouts)
        epoch, step = whole("epoch", epoch), whole("step", step)
        c.call(lambda: c.consume(ids, epoch, step, release))

    def release(self, rollouts: Iterable[int]) -> None:
        """They are safe elsewhere (in a dataset): the log need not keep them, and does not deliver them again.

        Raises:
            UnknownRollout: not in the log, or released before.
            BadInput: one of them was not delivered, or a number is none; nothing was changed.
        """
        c, ids = self._running(), rollout_ids(rollouts)
        c.call(lambda: c.release(ids))

    def abort(self, rollout: int, *, reason: str = "abort") -> None:
        """Give one up. It is delivered as censored, with what it had. One that is over already is left as it is.

        Raises:
            UnknownRollout: not in the log, or released before.
            BadInput: a reason that is no text; nothing was changed.
        """
        c, rollout = self._running(), whole("rollout", rollout)
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
        check_follows(version, c.wal.state.policy, same=True)
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
    def policy(self) -> Policy:
        """The policy in force: its version, the digest of its weights, and where a resume finds them."""
        c = self._running()
        policy = c.call(lambda: c.wal.state.policy)
        assert policy is not None
        return policy

    @property
    def policy_version(self) -> int:
        """The policy version in force."""
        return self.policy.version

    def cohorts(self) -> dict[str, CohortCount]:
        """Every cohort of this job by name, those included that are wholly used."""
        c = self._running()
        return c.call(c.wal.cohorts)

    def cohorts_in_flight(self) -> dict[str, CohortCount]:
        """Those of which something is in flight. Costs what that is, whatever the job has had."""
        c = self._running()
        return c.call(c.wal.cohorts_in_flight)

    def cohort(self, name: str) -> CohortCount | None:
        """One cohort, or None if the log has none of this name."""
        c = self._running()
        return c.call(lambda: c.wal.cohort(name))

    def in_flight(self, cohort: str) -> list[int]:
        """Rollouts of a cohort that are neither finished nor censored."""
        c = self._running()

        def find() -> list[int]:
            state = c.wal.state.cohort_named(cohort)
            return list(state.running) if state is not None else []

        return c.call(find)

    def members(self, cohort: str) -> dict[int, int]:
        """Rollout ids by index: the members of a cohort that have begun and were neither consumed nor released."""
        c = self._running()

        def find() -> dict[int, int]:
            state = c.wal.state.cohort_named(cohort)
            return {r.begin.index: r.id for r in state.unused.values()} if state is not None else {}

        return c.call(find)

    def worker_pids(self) -> dict[str, int]:
        """Process ids by worker name."""
        c = self._running()
        return c.call(c.fleet.pids)

    def worker_steps(self) -> dict[str, tuple[int, int]]:
        """By worker name: how often it was started, and its engine steps since."""
        c = self._running()
        return c.call(c.fleet.steps)

    def kill_worker(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a worker, to see what happens then."""
        c = self._running()
        c.call(lambda: c.fleet.signal(name, number))

    @property
    def coordinator(self) -> Coordinator | None:
        """For this package's own metrics and tests; None while it is closed."""
        return self._coordinator

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
        seed: int | None,
        cohort: str | None,
        metadata: Sequence[Mapping[str, Any]] | None,
        noise: Noise,
    ) -> None:
        """Begin what has not begun, durably, and attach the outlet."""
        c = self._running()
        submission = Submission(
            prompts,
            sampling,
            group_size=group_size,
            seed=seed,
            metadata=metadata,
            noise=noise,
            info=c.wal.info,
            episodes=self._options["episodes"],
        )
        if submission.has_stops:
            c.endings.load_tokenizer()

        def begin() -> None:
            name = cohort if cohort is not None else self._names.give(c.wal, submission.digest)
            number, fresh = submission.begin(c.wal, name)
            c.enqueue(fresh)
            c.handover.attach(number, outlet)

        c.call(begin)

    def _drain(self, outlet: Outlet, items: queue.SimpleQueue[Item], *, shown: Progress | None = None) -> Drain:
        c = self._running()
        # Posted, not called: the garbage collector may drop the iterator on any thread.
        return Drain(items, lambda: c.post(lambda: c.handover.detach(outlet)), shown)


def _to_loop(loop: asyncio.AbstractEventLoop, items: asyncio.Queue[Item], item: Item) -> None:
    loop.call_soon_threadsafe(items.put_nowait, item)
