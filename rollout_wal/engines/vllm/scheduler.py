"""The write-ahead log inside vLLM's engine core: a scheduler class.

    vllm serve MODEL --scheduler-cls rollout_wal.engines.vllm.scheduler.LoggingScheduler \\
        --logits-processors rollout_wal.engines.vllm.processor:PositionNoise \\
        --additional-config '{"rollout_wal": {"log": "runs/wal"}}'

Requests whose `extra_args` name a rollout (see `request`) are logged step by step, and their outputs leave the engine
core only once their records are durable. A request that names a rollout of which tokens are logged, by this process or
by one that was killed, goes on from them: the response begins with what is logged, and a rollout that had ended is
answered from the log alone. All other requests pass untouched.

A subclass of vLLM's scheduler and little else: `update_from_output` logs and holds, `add_request` resumes,
`finish_requests` lets go, `has_requests` keeps the engine's loop turning while outputs are held. Of new weights it
hears by `weights`, which wraps methods of the engine core.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import supported  # noqa: F401  # isort: skip  # before what only the supported vLLM has
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine import FinishReason as VllmFinish
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus

from ...errors import BadInput, problem
from ..base import FinishReason
from ..common.routes import INFO
from ..common.step_log import DECLARED, StepLog
from . import support
from .config import check_config, options_of
from .model import eos_of, info_message, info_of, quick_digest, routes_shape
from .outputs import Outputs, ending, merged
from .processor import PositionNoise
from .request import RolloutSpec, named, spec_of
from .rollout import Rollout
from .rows import Rows, append_step
from .weights import WatchesWeights, Weights, watch

logger = logging.getLogger(__name__)


class _Logging(Scheduler, WatchesWeights):
    """The part that both schedulers share; mixed in before one of vLLM's."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        version = support.check(support.SCHEDULER_HOOKS)
        check_config(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        options = options_of(vllm_config)
        folder = Path(vllm_config.model_config.model)
        digest = options.get("weights_digest") or quick_digest(folder)
        self._eos = eos_of(vllm_config.model_config)
        self._rollouts: dict[str, Rollout] = {}
        """Those that run, by request id."""
        rank = vllm_config.parallel_config.data_parallel_index
        self._log: StepLog[Outputs] = StepLog.open(
            Path(options["log"]) / str(rank),
            info={**info_message(info_of(vllm_config, version, digest)), INFO: routes_shape(vllm_config)},
            policy_version=options["policy_version"],
            weights_digest=digest,
            source=str(folder),
            segment_bytes=int(options.get("segment_bytes", 64 << 20)),
            policy=options["policy"],
            take_over=bool(options.get("take_over", False)),
            keep=int(options.get("keep", 10_000)),
        )
        # Where the sampler runs in this process, the log-probability of each draw is at hand.
        self._draws = PositionNoise.draws if vllm_config.parallel_config.world_size == 1 else None
        self._in_flight = 0
        """Steps that are scheduled and not yet back."""
        self._weights = [Weights(options["policy_version"])]
        """All that have been in force, in order. A step carries the index of those that it was scheduled under."""
        self._logged = 0
        """Index of those whose version the log has last. Later ones wait until steps of the ones before are back."""
        watch()

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(self, request: VllmRequest) -> None:
        spec = spec_of(request.sampling_params) if request.sampling_params is not None else None
        if spec is None or request.request_id in self.requests:
            super().add_request(request)
            return
        try:
            self._add_rollout(request, spec)
        except BadInput as error:
            # Raised here it would end the engine core, and with it everybody's requests.
            self._end_with(request.client_index, request.request_id, str(error))

    def _end_with(self, client: int, name: str, error: str) -> None:
        logger.warning("request %s is refused: %s", name, error)
        self._log.hold(ending(client, name, VllmFinish.ERROR, error))

    def _add_rollout(self, request: VllmRequest, spec: RolloutSpec) -> None:
        if spec.release:
            self._log.forget(named(self._log.rollouts(), spec.release))
        rollout = Rollout(spec, request, self._eos, self.max_model_len)
        self._log.check_attempt(rollout.id, spec.attempt)  # before anything that runs is cut off
        self._cut_off(rollout.id)
        logged = self._log.logged(rollout.id) if not spec.prefix else None
        if logged is not None and len(logged):
            reason = rollout.ended(logged)
            if reason is not FinishReason.RUNNING:
                # It had ended before: nothing is decoded, and nothing more is logged.
                self._log.hold(rollout.replay(logged, reason))
                return
        if rollout.sampled:
            # max_tokens counts over all resumes, whoever resumes.
            request.max_tokens -= rollout.sampled
            if request.max_tokens <= 0:
                self._log.hold(ending(rollout.client, request.request_id, VllmFinish.LENGTH))
                return
        bound = self._log.bind(rollout.id, spec.attempt, start=spec.prefix if spec.prefix else None)
        rollout.slot = bound.slot
        if logged is not None and len(logged):
            self._log.hold(rollout.replay(logged, FinishReason.RUNNING))
            rollout.go_on_from(request, logged)
        rollout.prepare(request)
        self._rollouts[request.request_id] = rollout
        super().add_request(request)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[VllmRequest]:
        """Aborts, by a client, a pause or a shutdown. Never a Finish: what is logged stays, for a resume."""
        gone: list[VllmRequest] = super().finish_requests(request_ids, finished_status)
        for request in gone:
            self._let_go(request.request_id)
        return gone

    def _cut_off(self, rollout_id: int) -> None:
        """A client that asks again for a rollout that runs has given up on its earlier request."""
        for name, rollout in list(self._rollouts.items()):
            if rollout.id == rollout_id:
                self.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                self._log.hold(ending(rollout.client, name, VllmFinish.ABORT))

    def _let_go(self, name: str) -> None:
        rollout = self._rollouts.pop(name, None)
        if rollout is not None:
            self._log.release(rollout.id)

    # -- steps --------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        scheduled = super().schedule(*args, **kwargs)
        scheduled.rollout_wal_weights = len(self._weights) - 1
        self._in_flight += 1
        return scheduled

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Outputs:
        out: Outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._log_policy(scheduler_output.rollout_wal_weights)
        if self._rollouts:
            self._append(out, self._weights[scheduler_output.rollout_wal_weights])
        self._in_flight -= 1
        if not self._in_flight:
            self._log_policy(len(self._weights) - 1)
        if not self._log.holding:
            return out
        if not scheduler_output.total_num_scheduled_tokens:
            self._log.flush()  # nothing computes meanwhile
        return merged([*self._log.take(), out])

    def _append(self, out: Outputs, weights: Weights) -> None:
        """Log the rows of rollouts, and keep their outputs back."""
        rows: Rows = []
        for outputs in out.values():
            ours = [(o, r) for o in outputs.outputs if (r := self._rollouts.get(o.request_id)) is not None]
            if not ours:
                continue
            rows += ours
            names = {o.request_id for o, _ in ours}
            outputs.outputs = [o for o in outputs.outputs if o.request_id not in names]
        if not rows:
            return
        if weights.version is None:
            for output, rollout in rows:
                self._disown(output, rollout, _nameless(weights))
            return
        refused = append_step(self._log, rows, self._draws)
        for output, rollout, why in refused:
            self._disown(output, rollout, why)
        held: Outputs = {}
        for output, rollout in rows:
            if output.request_id in self._rollouts:
                rollout.release(output)
                held.setdefault(rollout.client, EngineCoreOutputs(outputs=[])).outputs.append(output)
        if held:
            self._log.hold(held)
        for output, _ in rows:
            if output.finish_reason is not None:
                self._let_go(output.request_id)

    def _disown(self, output: EngineCoreOutput, rollout: Rollout, why: str) -> None:
        """End a rollout whose newest tokens may not be logged. What is logged of it stays, for a resume."""
        if output.finish_reason is None:
            self.finish_requests(rollout.name, RequestStatus.FINISHED_ERROR)
        self._let_go(rollout.name)
        self._end_with(rollout.client, rollout.name, why)

    def has_requests(self) -> bool:
        """Also while outputs are held: the loop must turn once more to let them go."""
        return bool(super().has_requests() or self._log.holding)

    # -- the engine's life ----------------------------------------------------------------------------------------

    def policy_changed(self, version: str) -> None:
        """The weights have a name: what is scheduled from here on is of this version.

        Durable when this returns, unless steps of the version before are in flight: then as soon as they are logged.

        Raises:
            BadInput: a version that is no number.
        """
        if not re.fullmatch(r"\d{1,18}", version):
            raise BadInput(
                problem(
                    f"the weight version {version!r} is no number",
                    consequence="It was not accepted: tokens are logged with the number of their policy. If the "
                    "weights were replaced before, no rollout goes on until they have one",
                    remedy="Pass the policy version as digits, '17' say",
                )
            )
        self._weights.append(Weights(int(version)))
        if not self._in_flight:
            self._log_policy(len(self._weights) - 1)

    def weights_touched(self, by: str) -> None:
        """The weights may be replaced from now on: no rollout goes on under the version before."""
        logger.info("%s: the policy version is unknown until one is named", by)
        self._weights.append(Weights(None, by))

    def _log_policy(self, index: int) -> None:
        """Log the version of these weights, if it is known and not logged."""
        version = self._weights[index].version
        if index <= self._logged or version is None:
            return
        self._log.policy(version, f"{DECLARED}{version}")
        self._logged = index

    def shutdown(self) -> None:
        """In good order: everything sampled is durable."""
        self._log.close()
        super().shutdown()


class _SyncLoggingScheduler(_Logging):
    pass


class LoggingScheduler(_Logging, AsyncScheduler):
    """vLLM's scheduler with the log inside. See the module.

    Configured by `additional_config={"rollout_wal": {...}}`:
        log: directory; each data-parallel rank has its own log in it, named by its number. Or set ROLLOUT_WAL_VLLM_LOG.
        policy_version: number of the weights that the engine starts with. Default: 0.
        weights_digest: of those weights. Default: over headers and samples of the model's files.
        policy: {"kind": "step" | "group", "group_ms": ..., "group_bytes": ...}: when the log is synced.
        segment_bytes: size of the log's files.
        keep: how many rollouts that do not run stay in the log. Default: 10,000.
        take_over: fence a live owner of the log instead of waiting for it to end.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM takes a subclass of AsyncScheduler for asynchronous scheduling, and uses it for synchronous one too,
        # where its placeholders would be wrong.
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return _SyncLoggingScheduler(vllm_config, *args, **kwargs)


def _nameless(weights: Weights) -> str:
    return problem(
        f"{weights.by} may have replaced the weights, and no version was named since",
        consequence="The rollout was ended and its newest token not logged: it would carry the version of other "
        "weights. What was logged before stays",
        remedy="Name the version by finish_weight_update(weight_version='17') or update_weight_version('17'), and ask "
        "for the rollout again. Pause generation while weights are replaced, and no rollout is ended",
    )
