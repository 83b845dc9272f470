"""A rollout backend as a Ray actor: rollouts for whoever runs on the cluster, and a host that may die.

    from rollout_wal.trainers.ray_host import start_host

    host = start_host("models/tiny", "/data/runs/wal", workers=2, num_gpus=1)
    rollouts = ray.get(host.generate.remote("step-0", prompts, SamplingParams(max_tokens=512), group_size=8))
    ray.get(host.consumed.remote([r.id for r in rollouts], epoch=0, step=0))

One backend owns its directory, and many Ray tasks and actors want rollouts; so the backend lives in an actor of its
own and the others call it by name. Ray restarts the actor when it dies and sends the calls again that were not
answered. That is safe because every call here may come twice: a cohort that is in the log goes on, whoever asks, and
`consumed` and `release` leave out what is gone already.

Ray carries arguments and answers between its processes in its own way, which is pickle. Nothing of that is written to
disk, and whoever can reach a Ray cluster can run code on it anyway.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from numpy.typing import ArrayLike

from ..backend import FinishedRollout, RolloutBackend
from ..backend.spec import EngineSpec
from ..engines.base import EngineInfo
from ..errors import BadInput, CheckpointMismatch, CohortMismatch, MissingExtra, problem
from ..params import SamplingParams
from ..wal import Balance, CohortCount
from .ledger import TrainerLedger

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise MissingExtra(error.name or "ray", "ray", "a rollout backend on Ray") from None

#: The actor's name, if none is given.
DEFAULT_NAME = "rollout-wal"
_ASKED = "rollout_wal.asked"
_SAMPLING = "rollout_wal.sampling"
_STEP = "step"


@dataclass(slots=True)
class _Cohort:
    """A cohort that this process of the actor hands out: one future for each rollout."""

    rollouts: dict[int, asyncio.Future[FinishedRollout]]
    items: Iterator[FinishedRollout] | None = None
    """The one that is read. A later call takes the cohort over from it."""


@dataclass(slots=True)
class _Gathering:
    """A cohort whose members have not all been named yet."""

    size: int
    group_size: int
    seed: int
    sampling: SamplingParams
    prompts: dict[int, list[int]] = field(default_factory=dict)
    metadata: dict[int, dict[str, Any]] = field(default_factory=dict)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None


class RolloutHost:
    """What runs in the actor. `start_host` makes one.

    Every method may be called again with the same arguments, and by any number of callers.
    """

    def __init__(self, engine: EngineSpec | str, path: str, options: Mapping[str, Any], shared: bool) -> None:
        options = dict(options)
        if shared and ray.get_runtime_context().was_current_actor_reconstructed:
            # Ray has given the old actor up, and that one may live on, cut off on another node: it is fenced.
            options["take_over"] = True
        self._backend = RolloutBackend(engine, path, **options).start()
        self._cohorts: dict[str, _Cohort] = {}
        self._gathering: dict[str, _Gathering] = {}
        self._labels: dict[int, int] = {}
        self._handed_over = False
        self._lock = asyncio.Lock()

    # -- rollouts -----------------------------------------------------------------------------------------------

    async def generate(
        self,
        cohort: str,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int = 0,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[FinishedRollout]:
        """All rollouts of a cohort that are not gone, in the order of the prompts; see `RolloutBackend.generate`.

        Raises:
            BadPrompt, BadSampling, CohortMismatch: nothing was begun.
        """
        async with self._lock:
            futures = await self._begin(cohort, prompts, sampling, group_size, seed, metadata)
        return [await asyncio.shield(futures[index]) for index in sorted(futures)]

    async def _begin(
        self,
        cohort: str,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        group_size: int,
        seed: int,
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> dict[int, asyncio.Future[FinishedRollout]]:
        """Even where this process knows the cohort: the backend compares what is asked for with the log."""
        items = await asyncio.to_thread(
            self._backend.generate,
            prompts,
            sampling,
            group_size=group_size,
            seed=seed,
            cohort=cohort,
            metadata=metadata,
        )
        return await self._read(cohort, items)

    async def rollout(self, cohort: str, index: int) -> FinishedRollout:
        """One member of a cohort that has begun, when it is finished or censored.

        Raises:
            BadInput: there is no such cohort, or this member of it was consumed or released.
        """
        async with self._lock:
            if cohort not in self._cohorts:
                await self._read(cohort, await asyncio.to_thread(self._backend.again, cohort))
            future = self._cohorts[cohort].rollouts.get(index)
        if future is None:
            raise BadInput(
                problem(
                    f"cohort {cohort!r} has no member {index}, or it was consumed or released",
                    consequence="Nothing was sampled",
                    remedy="Ask for members that a later step may still use",
                )
            )
        return await asyncio.shield(future)

    async def join(
        self,
        cohort: str,
        index: int,
        size: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        seed: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> FinishedRollout:
        """Member `index` of a cohort that `size` callers begin together, each knowing its own prompt only.

        The cohort begins when all of them have called, whole, before any token is sampled; so it is as closed as one
        that a single caller begins. Where the log has it already, callers are served from there, in any number.

        Args:
            group_size: so many consecutive members are of one group, and must have the same prompt.
            metadata: logged, and handed out with the group's rollouts; the first member's counts.

        Raises:
            CohortMismatch: the log, or another caller, has another prompt or other parameters for this cohort.
            CheckpointMismatch: a checkpoint that contains this cohort made the log let go of some of it.
        """
        prompt = [int(token) for token in prompt]
        asked = _digest(prompt, sampling, size, group_size, seed)
        async with self._lock:
            gathering = self._gathering.get(cohort)
            if gathering is None and not await self._is_whole(cohort):
                gathering = self._gathering.setdefault(cohort, _Gathering(size, group_size, seed, sampling))
            if gathering is not None:
                await self._gather(cohort, gathering, index, prompt, (size, group_size, seed, sampling), metadata)
        if gathering is not None:
            await gathering.begun.wait()
            if gathering.error is not None:
                raise gathering.error
        rollout = await self.rollout(cohort, index)
        if rollout.metadata.get(_ASKED) != asked:
            raise _mismatch(cohort, index)
        return rollout

    async def _is_whole(self, cohort: str) -> bool:
        """Every member has begun. A host that died while it began a cohort leaves one of which that is not so: nobody
        was served from it, so all who want it call again, and begin the rest."""
        known = (await asyncio.to_thread(self._backend.cohorts)).get(cohort)
        if known is None:
            return False
        if known.gone:
            raise CheckpointMismatch(
                problem(
                    f"{known.gone} of the {known.size} rollouts of cohort {cohort!r} are consumed or released",
                    consequence="Nothing was sampled; using what is left would use some rollouts twice",
                    remedy="Resume from the newest checkpoint, or give the run another name",
                )
            )
        return len(await asyncio.to_thread(self._backend.members, cohort)) == known.size

    async def _gather(
        self,
        cohort: str,
        gathering: _Gathering,
        index: int,
        prompt: list[int],
        asked: tuple[int, int, int, SamplingParams],
        metadata: Mapping[str, Any] | None,
    ) -> None:
        size, step, seed, sampling = asked
        known = (gathering.size, gathering.group_size, gathering.seed, gathering.sampling)
        if known != asked or not 0 <= index < size or size % step or gathering.prompts.get(index, prompt) != prompt:
            # The others would wait for ever: it is theirs too, and the next ones gather anew.
            gathering.error = _mismatch(cohort, index)
            del self._gathering[cohort]
            gathering.begun.set()
            return
        gathering.prompts[index] = prompt
        if index % step == 0:
            marks = {_ASKED: _digest(prompt, sampling, size, step, seed), _SAMPLING: sampling.to_dict()}
            gathering.metadata[index // step] = {**(metadata or {}), **marks}
        if len(gathering.prompts) < size:
            return
        del self._gathering[cohort]
        first = [gathering.prompts[i] for i in range(0, size, step)]
        try:
            if any(gathering.prompts[i] != first[i // step] for i in range(size)):
                raise _mismatch(cohort, index)
            await self._begin(cohort, first, sampling, step, seed, [gathering.metadata[g] for g in range(len(first))])
        except Exception as error:
            gathering.error = error
        finally:
            gathering.begun.set()

    # -- handing out --------------------------------------------------------------------------------------------

    async def _read(self, cohort: str, items: Iterator[FinishedRollout]) -> dict[int, asyncio.Future[FinishedRollout]]:
        loop = asyncio.get_running_loop()
        members = await asyncio.to_thread(self._backend.members, cohort)
        entry = self._cohorts.setdefault(cohort, _Cohort({}))
        entry.items = items
        for index in members:
            entry.rollouts.setdefault(index, loop.create_future())
        threading.Thread(target=self._pump, args=(loop, entry, items), name=f"cohort {cohort}", daemon=True).start()
        return dict(entry.rollouts)

    def _pump(self, loop: asyncio.AbstractEventLoop, entry: _Cohort, items: Iterator[FinishedRollout]) -> None:
        """In a thread of its own: waiting for a rollout blocks."""
        try:
            for item in items:
                loop.call_soon_threadsafe(self._settle, entry, item)
        except Exception as error:
            loop.call_soon_threadsafe(self._fail, entry, items, error)

    def _settle(self, entry: _Cohort, item: FinishedRollout) -> None:
        future = entry.rollouts.get(item.index)
        if future is not None and not future.done():
            future.set_result(item)

    def _fail(self, entry: _Cohort, items: Iterator[FinishedRollout], error: Exception) -> None:
        if entry.items is not items:
            return  # a later call has taken the cohort over
        for future in entry.rollouts.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # it may be that nobody asks

    # -- what became of them --------------------------------------------------------------------------------------

    async def consumed(self, rollouts: Sequence[int], *, epoch: int, step: int) -> None:
        """Optimizer step `step` used them: they never come again. Durable when this returns.

        Those that are gone already are left out, for this may be the second call.
        """
        left = await asyncio.to_thread(self._known, rollouts)
        await asyncio.to_thread(self._backend.consumed, left, epoch=epoch, step=step)
        await self._forget()

    async def release(self, rollouts: Sequence[int]) -> None:
        """They are safe elsewhere, and do not come again. Those that are gone already are left out."""
        left = await asyncio.to_thread(self._known, rollouts)
        await asyncio.to_thread(self._backend.release, left)
        await self._forget()

    async def abort(self, rollout: int, *, reason: str = "abort") -> None:
        """Give one up; see `RolloutBackend.abort`."""
        await asyncio.to_thread(self._backend.abort, rollout, reason=reason)

    def _known(self, rollouts: Sequence[int]) -> list[int]:
        counts = self._backend.cohorts()
        known = {i for name, c in counts.items() if c.gone < c.size for i in self._backend.members(name).values()}
        return [int(i) for i in rollouts if int(i) in known]

    async def _forget(self) -> None:
        for name, entry in list(self._cohorts.items()):
            left = await asyncio.to_thread(self._backend.members, name)
            entry.rollouts = {i: future for i, future in entry.rollouts.items() if i in left}
            if not entry.rollouts:
                del self._cohorts[name]

    # -- checkpoints of a trainer ---------------------------------------------------------------------------------

    async def fresh(self, cohort: str) -> str:
        """A name like this one of which nothing is gone: for rollouts that nobody trains on, and that are let go."""
        counts = await asyncio.to_thread(self._backend.cohorts)
        names = (f"{cohort}.{n}" for n in itertools.count())
        return next(name for name in names if name not in counts or not counts[name].gone)

    async def state(self, run: str, batches: int, step: int, *, archive: str | None = None) -> dict[str, Any]:
        """What a checkpoint must hold that contains every batch below `batches`; see `TrainerLedger.state`.

        The batches are the cohorts `TrainerLedger(run).cohort(number)`; the optimizer step that used one is its
        metadata's "step", else `step`.
        """
        return await asyncio.to_thread(self._state, run, batches, step, archive)

    def _state(self, run: str, batches: int, step: int, archive: str | None) -> dict[str, Any]:
        ledger = self._ledger(run, archive)
        for name, count in self._backend.cohorts().items():
            number = name.removeprefix(ledger.cohort(0)[:-1])
            if number.isdecimal() and name == ledger.cohort(int(number)) and int(number) < batches:
                if count.gone == count.size:
                    continue
                rollouts = sorted(self._backend.again(name), key=lambda r: r.index)
                raw = rollouts[0].metadata.get(_SAMPLING)
                ledger.take(int(number), rollouts, SamplingParams.from_dict(raw) if raw else SamplingParams())
                ledger.used(int(number), int(rollouts[0].metadata.get(_STEP, step)))
        return ledger.state(batches, step)

    async def restore(self, run: str, state: Mapping[str, Any] | None, *, archive: str | None = None) -> None:
        """Bring the log to where a durable checkpoint is: what it contains is consumed. For the checkpoint that was
        just written, and for the one from which a trainer goes on; None: from the beginning.

        Raises:
            CheckpointMismatch: see `TrainerLedger.restore`. Nothing was changed.
        """
        await asyncio.to_thread(lambda: self._ledger(run, archive).restore(state))
        await asyncio.to_thread(self._release_evaluations, run)
        await self._forget()

    def _release_evaluations(self, run: str) -> None:
        for name, count in self._backend.cohorts().items():
            if name.startswith(f"{run}.0/eval/") and count.gone < count.size and not self._backend.in_flight(name):
                self._backend.release([r.id for r in self._backend.again(name)])

    def _ledger(self, run: str, archive: str | None) -> TrainerLedger:
        return TrainerLedger(self._backend, run, archive=Path(archive) if archive else None, extras={"host": "ray"})

    # -- weights, and looking ---------------------------------------------------------------------------------------

    async def update_weights(self, source: str | Mapping[str, Any], label: int | None = None) -> int:
        """Make these weights the policy in force, under the next version unless they are in force already.

        Args:
            source: a model folder that the host can read, or tensors by parameter name.
            label: what the caller calls this version, an optimizer step for instance.

        Returns:
            The policy version in force.
        """
        version = await asyncio.to_thread(lambda: self._backend.policy_version)
        first, self._handed_over = not self._handed_over, True
        try:
            # The first time in this process: this call may be the second one, or the trainer has been started again.
            await asyncio.to_thread(self._backend.update_weights, source, version if first else version + 1)
        except BadInput:
            if not first:
                raise
            await asyncio.to_thread(self._backend.update_weights, source, version + 1)
        version = await asyncio.to_thread(lambda: self._backend.policy_version)
        if label is not None:
            self._labels[version] = label
        return version

    async def labels(self) -> dict[int, int]:
        """What the versions were called that were put in force since the host started."""
        return dict(self._labels)

    async def info(self) -> EngineInfo:
        return self._backend.info

    async def policy_version(self) -> int:
        return await asyncio.to_thread(lambda: self._backend.policy_version)

    async def balance(self) -> Balance:
        return await asyncio.to_thread(self._backend.balance)

    async def cohorts(self) -> dict[str, CohortCount]:
        return await asyncio.to_thread(self._backend.cohorts)

    async def worker_pids(self) -> dict[str, int]:
        return await asyncio.to_thread(self._backend.worker_pids)

    async def pid(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        """Preempt the workers in good order. The actor is of no use afterwards: `ray.kill` it."""
        await asyncio.to_thread(self._backend.close)


def start_host(
    engine: EngineSpec | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT_NAME,
    namespace: str | None = None,
    detached: bool = False,
    shared: bool = False,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Any:
    """The host of this name, started if there is none. Ray restarts it when it dies, as often as it takes.

    Args:
        engine, path, options: of the `RolloutBackend`.
        name, namespace: by which `get_host` finds it.
        detached: it outlives the Ray job that started it, and so do its rollouts: a trainer that is started again finds
            it at work.
        shared: `path` is on a file system that every node sees, so the host may be restarted on any node, and takes
            the job over there from one that may only be cut off. Otherwise it stays on the caller's node, with logs.
        num_cpus, num_gpus: what Ray sets aside for the host and its workers.

    Returns:
        Ray's handle of the actor: `await host.generate.remote(...)`, or `ray.get` of it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RolloutHost).options(
        name=name,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached" if detached else None,
        # Forever: each restart goes on where the log ends, and callers get their answer from the next one.
        max_restarts=-1,
        max_task_retries=-1,
        # Callers wait inside for their rollouts.
        max_concurrency=1 << 16,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        scheduling_strategy=here if not shared else "DEFAULT",
    )
    model = engine if isinstance(engine, EngineSpec) else os.fspath(engine)
    return actor.remote(model, str(Path(path).resolve()), options, shared)


def get_host(name: str = DEFAULT_NAME, namespace: str | None = None) -> Any:
    """The handle of a host that somebody has started.

    Raises:
        BadInput: there is none of this name.
    """
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        raise BadInput(
            problem(
                f"no rollout host is called {name!r} on this Ray cluster",
                consequence="Nothing was sampled",
                remedy="Call start_host first, in the same namespace or with the same `namespace`",
            )
        ) from None


def _digest(prompt: list[int], sampling: SamplingParams, size: int, group_size: int, seed: int) -> str:
    packed: bytes = msgpack.packb([prompt, sampling.to_dict(), size, group_size, seed])
    return hashlib.sha256(packed).hexdigest()[:32]


def _mismatch(cohort: str, index: int) -> CohortMismatch:
    return CohortMismatch(
        problem(
            f"member {index} of cohort {cohort!r} was asked for with another prompt or other parameters before",
            consequence="Nothing was sampled for this call",
            remedy="Ask for the same again, which needs the same order of the data, or use another name",
        )
    )
