"""What runs in the actor: a rollout backend whose every call may come twice."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from ...backend import FinishedRollout, RolloutBackend
from ...backend.spec import EngineSpec
from ...backend.weights import same_weights
from ...engines.base import EngineInfo
from ...errors import BadInput, CheckpointMismatch, MissingExtra, problem
from ...params import SamplingParams
from ...records import Policy
from ...wal import Balance, CohortCount
from ..ledger import fresh_cohort
from . import checkpoints
from .ending import end_with
from .gathering import ASKED, Gathering, Request, mismatch
from .labels import Labels
from .served import Futures, Served

try:
    import ray
except ImportError as error:
    raise MissingExtra(error.name or "ray", "ray", "a rollout backend on Ray") from None


def shared_out(devices: Sequence[object], workers: int) -> list[str] | None:
    """What Ray has set aside for the actor, in equal parts for its workers; None where nothing is to be shared out, or
    one device is for all of them.

    Raises:
        BadInput: they cannot be shared out evenly.
    """
    if workers < 2 or len(devices) < 2:
        return None
    each, rest = divmod(len(devices), workers)
    if rest:
        raise BadInput(
            problem(
                f"num_gpus={len(devices)} for {workers} workers",
                consequence="The host was not started: some workers would have had fewer devices than others",
                remedy="Ask for a multiple, or say with devices=[...] what each worker sees",
            )
        )
    return [",".join(map(str, devices[i * each : (i + 1) * each])) for i in range(workers)]


def _is_in_force(source: str | Mapping[str, Any], policy: Policy) -> bool:
    folder = Path(policy.source)
    return same_weights(source, folder) if isinstance(source, Mapping) else Path(source).resolve() == folder


class RolloutHost:
    """What runs in the actor. `start_host` makes one.

    Every method may be called again with the same arguments, and by any number of callers.
    """

    def __init__(self, engine: EngineSpec | str, path: str, options: Mapping[str, Any], shared: bool) -> None:
        options = dict(options)
        if shared and ray.get_runtime_context().was_current_actor_reconstructed:
            # Ray has given the old actor up, and that one may live on, cut off on another node: it is fenced.
            options["take_over"] = True
        options.setdefault("devices", shared_out(ray.get_gpu_ids(), int(options.get("workers", 1))))
        self._backend = RolloutBackend(engine, path, **options).start()
        end_with(self._backend)
        self._served = Served(self._backend)
        self._gathering: dict[str, Gathering] = {}
        self._labels = Labels(Path(path) / "host")
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
        seed: int | None = None,
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
        seed: int | None,
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> Futures:
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
        return await self._served.read(cohort, items)

    async def rollout(self, cohort: str, index: int) -> FinishedRollout:
        """One member of a cohort that has begun, when it is finished or censored.

        Raises:
            BadInput: there is no such cohort, or this member of it was consumed or released.
        """
        async with self._lock:
            future = (await self._served.futures(cohort)).get(index)
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
        seed: int | None = None,
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
        request = Request(size, group_size, seed, sampling)
        async with self._lock:
            gathering = self._gathering.get(cohort)
            if gathering is None and not await self._is_whole(cohort):
                gathering = self._gathering.setdefault(cohort, Gathering(request))
            if gathering is not None:
                await self._gather(cohort, gathering, index, prompt, request, metadata)
        if gathering is not None:
            await gathering.begun.wait()
            if gathering.error is not None:
                raise gathering.error.with_traceback(None)  # one error for all: each raise would add to the last one's
        rollout = await self.rollout(cohort, index)
        if rollout.metadata.get(ASKED) != request.digest(prompt):
            raise mismatch(cohort, index)
        return rollout

    async def _is_whole(self, cohort: str) -> bool:
        """Every member has begun. A host that died while it began a cohort leaves one of which that is not so: nobody
        was served from it, so all who want it call again, and begin the rest."""
        known = await asyncio.to_thread(self._backend.cohort, cohort)
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
        gathering: Gathering,
        index: int,
        prompt: list[int],
        request: Request,
        metadata: Mapping[str, Any] | None,
    ) -> None:
        """One more member is named. With the last one, the cohort begins."""
        if not gathering.add(index, prompt, request, metadata):
            # The others would wait for ever: it is theirs too, and the next ones gather anew.
            del self._gathering[cohort]
            gathering.end(mismatch(cohort, index))
        if not gathering.complete or gathering.begun.is_set():
            return
        del self._gathering[cohort]
        try:
            groups = gathering.groups()
            if groups is None:
                raise mismatch(cohort, index)
            prompts, marks = groups
            await self._begin(cohort, prompts, request.sampling, request.group_size, request.seed, marks)
        except Exception as error:
            gathering.end(error)
        else:
            gathering.end()

    # -- what became of them --------------------------------------------------------------------------------------

    async def consumed(self, rollouts: Sequence[int], *, epoch: int, step: int) -> None:
        """Optimizer step `step` used them: they never come again. Durable when this returns.

        Those that are gone already are left out, for this may be the second call.
        """
        left = await asyncio.to_thread(self._known, rollouts)
        await asyncio.to_thread(self._backend.consumed, left, epoch=epoch, step=step)
        await self._served.forget_gone()

    async def release(self, rollouts: Sequence[int]) -> None:
        """They are safe elsewhere, and do not come again. Those that are gone already are left out."""
        left = await asyncio.to_thread(self._known, rollouts)
        await asyncio.to_thread(self._backend.release, left)
        await self._served.forget_gone()

    async def abort(self, rollout: int, *, reason: str = "abort") -> None:
        """Give one up; see `RolloutBackend.abort`."""
        await asyncio.to_thread(self._backend.abort, rollout, reason=reason)

    def _known(self, rollouts: Sequence[int]) -> list[int]:
        counts = self._backend.cohorts()
        known = {i for name, c in counts.items() if c.gone < c.size for i in self._backend.members(name).values()}
        return [int(i) for i in rollouts if int(i) in known]

    # -- checkpoints of a trainer ---------------------------------------------------------------------------------

    async def fresh(self, cohort: str) -> str:
        """See `fresh_cohort`."""
        return fresh_cohort(await asyncio.to_thread(self._backend.cohorts), f"{cohort}.0")

    async def state(self, run: str, batches: int, step: int, *, archive: str | None = None) -> dict[str, Any]:
        """What a checkpoint must hold that contains every batch below `batches`; see `TrainerLedger.state`.

        The batches are the cohorts `TrainerLedger(run).cohort(number)`; the optimizer step that used one is its
        metadata's "step", else `step`.
        """
        return await asyncio.to_thread(checkpoints.state_of, self._backend, run, batches, step, archive)

    async def restore(self, run: str, state: Mapping[str, Any] | None, *, archive: str | None = None) -> None:
        """Bring the log to where a durable checkpoint is: what it contains is consumed. For the checkpoint that was
        just written, and for the one from which a trainer goes on; None: from the beginning.

        Raises:
            CheckpointMismatch: see `TrainerLedger.restore`. Nothing was changed.
        """
        await asyncio.to_thread(checkpoints.restore, self._backend, run, state, archive)
        await self._served.forget_gone()

    # -- weights, and looking ---------------------------------------------------------------------------------------

    async def update_weights(self, source: str | Mapping[str, Any], label: int | None = None) -> int:
        """Make these weights the policy in force, under the next version unless they are in force already.

        Args:
            source: a model folder that the host can read, or tensors by parameter name.
            label: what the caller calls this version, an optimizer step for instance.

        Returns:
            The policy version in force.
        """
        policy = await asyncio.to_thread(lambda: self._backend.policy)
        # The first time in this process: this call may be the second one, or the trainer has been started again.
        # Compared here: the backend can only find out by loading them, and kills workers that hold others.
        first, self._handed_over = not self._handed_over, True
        if not (first and await asyncio.to_thread(_is_in_force, source, policy)):
            await asyncio.to_thread(self._backend.update_weights, source, policy.version + 1)
        version = await asyncio.to_thread(lambda: self._backend.policy_version)
        if label is not None:
            await asyncio.to_thread(self._labels.set, version, label)
        return version

    async def labels(self) -> dict[int, int]:
        """What the policy versions were called when they were put in force, by this host and those before it."""
        return self._labels.all()

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
