"""The write-ahead log inside vLLM's engine core: a scheduler class.

    vllm serve MODEL --scheduler-cls rollout_wal.engines.vllm.scheduler.LoggingScheduler \\
        --logits-processors rollout_wal.engines.vllm.processor:PositionNoise \\
        --additional-config '{"rollout_wal": {"log": "runs/wal"}}'

Requests whose `extra_args` name a rollout (see `request`) are logged step by step, and their outputs leave the engine
core only once their records are durable. A request that names a rollout of which tokens are logged, by this process or
by one that was killed, goes on from them: the response begins with what is logged, and a rollout that had ended is
answered from the log alone. All other requests pass untouched.

A subclass of vLLM's scheduler and nothing else: `update_from_output` logs and holds, `add_request` resumes,
`finish_requests` lets go, `has_requests` keeps the engine's loop turning while outputs are held.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine import FinishReason as VllmFinish
from vllm.v1.engine.core import EngineCore
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus

from ...errors import BadInput, problem
from ...finish import finish_reason
from ...log.policy import SyncPolicy
from ...params import SamplingParams
from ..base import FinishReason, Request
from ..common.logged import Logged
from ..common.step_log import DECLARED, StepLog
from . import support
from .model import eos_of, info_message, info_of, quick_digest
from .processor import PLAN, PositionNoise, plan_of
from .request import RolloutSpec, named, noise_key, rollout_id, sampling_of, spec_of

logger = logging.getLogger(__name__)

_CONFIG: Final = "rollout_wal"
_ENVIRONMENT: Final = "ROLLOUT_WAL_VLLM_LOG"
_OPTIONS: Final = frozenset({"log", "policy_version", "weights_digest", "segment_bytes", "keep", "policy", "take_over"})

Outputs = dict[int, EngineCoreOutputs]
"""What a step hands to each of vLLM's front ends."""


class _Logging(Scheduler):
    """The part that both schedulers share; mixed in before one of vLLM's."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        version = support.check(support.SCHEDULER_HOOKS)
        _check_config(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        options = _options(vllm_config)
        folder = Path(vllm_config.model_config.model)
        digest = options.get("weights_digest") or quick_digest(folder)
        self._eos = eos_of(vllm_config.model_config)
        self._members: dict[str, _Member] = {}
        rank = vllm_config.parallel_config.data_parallel_index
        self._log: StepLog[Outputs] = StepLog.open(
            Path(options["log"]) / str(rank),
            info=info_message(info_of(vllm_config, version, digest)),
            policy_version=int(options.get("policy_version", 0)),
            weights_digest=digest,
            source=str(folder),
            segment_bytes=int(options.get("segment_bytes", 64 << 20)),
            policy=SyncPolicy(**options.get("policy", {})),
            take_over=bool(options.get("take_over", False)),
            keep=int(options.get("keep", 10_000)),
        )
        # Where the sampler runs in this process, the log-probability of each draw is at hand.
        self._samples_here = vllm_config.parallel_config.world_size == 1 and PositionNoise.last is not None
        _announce_weight_versions()

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
            logger.warning("request %s is refused: %s", request.request_id, error)
            refused = EngineCoreOutput(request.request_id, [], finish_reason=VllmFinish.ERROR)
            self._log.hold(_outputs(request.client_index, refused))

    def _add_rollout(self, request: VllmRequest, spec: RolloutSpec) -> None:
        if spec.release:
            self._log.forget(named(self._log.rollouts(), spec.release))
        member = _Member(spec, request, self._eos, self.max_model_len)
        self._log.check_attempt(member.rollout, spec.attempt)  # before anything that runs is cut off
        self._cut_off(member.rollout)
        logged = self._log.logged(member.rollout) if not spec.prefix else None
        if logged is not None and len(logged):
            reason = member.ended(logged)
            if reason is not FinishReason.RUNNING:
                # It had ended before: nothing is decoded, and nothing more is logged.
                self._log.hold(member.replay(logged, reason))
                return
        if member.sampled:
            # max_tokens counts over all resumes, whoever resumes.
            request.max_tokens -= member.sampled
            if request.max_tokens <= 0:
                over = EngineCoreOutput(request.request_id, [], finish_reason=VllmFinish.LENGTH)
                self._log.hold(_outputs(member.client, over))
                return
        bound = self._log.bind(member.rollout, spec.attempt, start=spec.prefix if spec.prefix else None)
        member.slot = bound.slot
        if logged is not None and len(logged):
            self._log.hold(member.replay(logged, FinishReason.RUNNING))
            member.go_on_from(request, logged)
        member.prepare(request)
        self._members[request.request_id] = member
        super().add_request(request)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[VllmRequest]:
        """Aborts, by a client, a pause or a shutdown. Never a Finish: what is logged stays, for a resume."""
        gone: list[VllmRequest] = super().finish_requests(request_ids, finished_status)
        for request in gone:
            self._let_go(request.request_id)
        return gone

    def _cut_off(self, rollout: int) -> None:
        """A client that asks again for a rollout that runs has given up on its earlier request."""
        for name, member in list(self._members.items()):
            if member.rollout == rollout:
                self.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                self._log.hold(_outputs(member.client, EngineCoreOutput(name, [], finish_reason=VllmFinish.ABORT)))

    def _let_go(self, name: str) -> None:
        member = self._members.pop(name, None)
        if member is not None:
            self._log.release(member.rollout)

    # -- steps --------------------------------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Outputs:
        out: Outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._members:
            self._append(out)
        if not self._log.holding:
            return out
        if not scheduler_output.total_num_scheduled_tokens:
            self._log.flush()  # nothing computes meanwhile
        return _merged([*self._log.take(), out])

    def _append(self, out: Outputs) -> None:
        """Log the rows of rollouts, and keep their outputs back."""
        rows: list[tuple[EngineCoreOutput, _Member]] = []
        held: Outputs = {}
        for client, outputs in out.items():
            ours = [(o, m) for o in outputs.outputs if (m := self._members.get(o.request_id)) is not None]
            if not ours:
                continue
            rows += ours
            names = {o.request_id for o, _ in ours}
            held[client] = EngineCoreOutputs(outputs=[o for o, _ in ours])
            outputs.outputs = [o for o in outputs.outputs if o.request_id not in names]
        if not rows:
            return
        if not self._append_single(rows):
            self._append_any(rows)
        for output, member in rows:
            if not member.wants_logprobs:
                output.new_logprobs = None
        self._log.hold(held)
        for output, _ in rows:
            if output.finish_reason is not None:
                self._let_go(output.request_id)

    def _append_single(self, rows: list[tuple[EngineCoreOutput, _Member]]) -> bool:
        """The common step: one token and both log-probabilities for each row. False: it is another, nothing is done."""
        drawn = self._drawn()
        if drawn is None:
            return False
        slots, tokens, logprobs, sampling = [], [], [], []
        for output, member in rows:
            known = drawn.get(member.slot)
            if known is None or output.new_token_ids != [known[0]] or output.new_logprobs is None:
                return False
            slots.append(member.slot)
            tokens.append(known[0])
            logprobs.append(output.new_logprobs.logprobs[0, 0])
            sampling.append(known[1])
        finish = [member.took(output) for output, member in rows]
        self._log.append(
            np.array(slots, np.uint16),
            np.array(tokens, np.uint32),
            np.array(finish, np.uint8),
            np.array(logprobs, np.float32),
            np.array(sampling, np.float32),
        )
        return True

    def _append_any(self, rows: list[tuple[EngineCoreOutput, _Member]]) -> None:
        """Any step: rows of several tokens or of none, and rows whose sampling logprob is not known here."""
        drawn = self._drawn()
        told: list[_Row] = []
        for output, member in rows:
            reason = member.took(output)
            if output.new_token_ids:
                told.append(_Row(member.slot, output, reason, member.sampling_logprobs(output, drawn)))
        # A column is whole or absent: rows without a sampling logprob go into a frame of their own.
        for group in ([r for r in told if r.sampling is not None], [r for r in told if r.sampling is None]):
            if group:
                self._log.append(*_columns(group), count_R=_counts(group))

    def _drawn(self) -> dict[int, tuple[int, float]] | None:
        if not self._samples_here:
            return None
        assert PositionNoise.last is not None
        tag, token, _, sampling = PositionNoise.last.drawn
        return dict(zip(tag.tolist(), zip(token.tolist(), sampling.tolist(), strict=True), strict=True))

    def has_requests(self) -> bool:
        """Also while outputs are held: the loop must turn once more to let them go."""
        return bool(super().has_requests() or self._log.holding)

    # -- the engine's life ----------------------------------------------------------------------------------------

    def policy_changed(self, version: str) -> None:
        """The weights were replaced: log it before a token is sampled under them. Durable when this returns.

        Raises:
            BadInput: a version that is no number.
        """
        if not re.fullmatch(r"\d{1,18}", version):
            raise BadInput(
                problem(
                    f"the weight version {version!r} is no number",
                    consequence="It was not accepted: tokens are logged with the number of their policy",
                    remedy="Pass the policy version as digits, '17' say",
                )
            )
        self._log.policy(int(version), f"{DECLARED}{version}")

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


class _Member:
    """A request that is a rollout."""

    def __init__(self, spec: RolloutSpec, request: VllmRequest, eos: tuple[int, ...], max_context: int) -> None:
        params = request.sampling_params
        self.client = request.client_index
        self.name = request.request_id
        self.spec = spec
        self.eos = eos
        self.max_context = max_context
        self.sampling: SamplingParams = sampling_of(params)
        self.wants_logprobs = params.logprobs is not None
        self.prompt: list[int] = list(request.prompt_token_ids or ())
        self.key = noise_key(spec, params.seed)
        self.rollout = rollout_id(spec.name, self.prompt, self.sampling, self.key)
        self.sampled = spec.prefix - len(spec.observed)
        self.cut = len(self.prompt) - spec.prefix
        self.observed = spec.observed
        if not len(self.prompt) - spec.prefix > 0 or any(not 0 <= i < spec.prefix for i in spec.observed):
            raise BadInput(
                problem(
                    f"{spec.prefix} of the {len(self.prompt)} prompt tokens of rollout {spec.name!r} are output",
                    consequence="It was not accepted",
                    remedy="Submit token ids, at least one before the prefix, and observed indexes within it",
                )
            )
        self.slot = -1
        self.biased = bool(params.logit_bias or params.allowed_token_ids or params.bad_words)
        """Whether something changes the distribution that the project's parameters do not know."""

    def ended(self, logged: Logged) -> FinishReason:
        """Why a logged rollout is over, or RUNNING: its flag, or the finish predicate over its tokens."""
        if logged.finish is not FinishReason.RUNNING:
            return logged.finish
        return finish_reason(
            int(logged.token_T[-1]),
            sampled=len(logged),
            length=len(self.prompt) + len(logged),
            sampling=self.sampling,
            eos_token_ids=self.eos,
            max_context=self.max_context,
        )

    def replay(self, logged: Logged, reason: FinishReason) -> Outputs:
        """What is logged, as the first output of the request. A logged token has no rank: it says 0."""
        logprobs = None
        if self.wants_logprobs and bool(logged.logprob.valid_T.all()):
            tokens = logged.token_T[:, None]
            logprobs = LogprobsLists(tokens, logged.logprob.value_T[:, None], np.zeros(len(logged), np.int64))
        finish, stop = _VLLM_FINISH[reason], None
        if reason is FinishReason.STOP_TOKEN:
            stop = int(logged.token_T[-1])
        output = EngineCoreOutput(
            self.name, logged.token_T.tolist(), new_logprobs=logprobs, finish_reason=finish, stop_reason=stop
        )
        return _outputs(self.client, output)

    def go_on_from(self, request: VllmRequest, logged: Logged) -> None:
        """What is logged becomes part of the prompt: the model runner knows no other beginning."""
        request.append_output_token_ids(logged.token_T.tolist())
        request.prompt_token_ids = list(request.all_token_ids)
        request.num_prompt_tokens = len(request.prompt_token_ids)
        request._output_token_ids.clear()
        request.max_tokens -= len(logged)
        self.sampled = len(logged)

    def prepare(self, request: VllmRequest) -> None:
        """Parameters for vLLM: the draw is ours, its own sampling must leave it alone."""
        tokens = np.array(request.prompt_token_ids, np.int32)
        sampled = np.ones(len(tokens) - self.cut, np.bool_)
        sampled[list(self.observed)] = False
        ours = Request(self.slot, tokens[: self.cut], tokens[self.cut :], sampled, self.sampling, self.key)
        params = request.sampling_params.clone()
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed = 0.0, 0, 1.0, 0.0, None
        params.repetition_penalty, params.presence_penalty, params.frequency_penalty = 1.0, 0.0, 0.0
        params.min_tokens = 0
        params.logprobs = params.logprobs if self.wants_logprobs else 0
        words = params.bad_words_token_ids or []
        params._bad_words_token_ids = None
        params.extra_args = {**(params.extra_args or {}), PLAN: plan_of(self.slot, ours, words)}
        request.sampling_params = params

    def took(self, output: EngineCoreOutput) -> FinishReason:
        """Count what a step sampled, and say in the project's terms why it ended."""
        self.sampled += len(output.new_token_ids)
        if output.finish_reason is None or not output.new_token_ids:
            return FinishReason.RUNNING
        if output.finish_reason == VllmFinish.STOP:
            ends = not self.sampling.ignore_eos and output.new_token_ids[-1] in self.eos
            return FinishReason.EOS if ends else FinishReason.STOP_TOKEN
        if output.finish_reason == VllmFinish.LENGTH:
            full = self.sampled >= self.sampling.max_tokens
            return FinishReason.MAX_TOKENS if full else FinishReason.CONTEXT
        return FinishReason.RUNNING  # an abort or an error is an interruption

    def sampling_logprobs(
        self, output: EngineCoreOutput, drawn: dict[int, tuple[int, float]] | None
    ) -> NDArray[np.float32] | None:
        """Under the distribution that the tokens were drawn from; None where it is not known here, never a guess."""
        count = len(output.new_token_ids)
        if drawn is not None and count == 1:
            token, value = drawn.get(self.slot, (-1, 0.0))
            return np.array([value], np.float32) if token == output.new_token_ids[0] else None
        s = self.sampling
        if s.temperature == 0:
            return np.zeros(count, np.float32)  # the draw was certain
        plain = s.temperature == 1 and not s.top_k and s.top_p == 1 and not s.min_p and not s.min_tokens
        plain = plain and s.repetition_penalty == 1 and not s.presence_penalty and not s.frequency_penalty
        if plain and output.new_logprobs is not None and not self.biased:
            return np.ascontiguousarray(output.new_logprobs.logprobs[:, 0], np.float32)
        return None


class _Row:
    __slots__ = ("output", "reason", "sampling", "slot")

    def __init__(
        self, slot: int, output: EngineCoreOutput, reason: FinishReason, sampling: NDArray[np.float32] | None
    ) -> None:
        self.slot, self.output, self.reason, self.sampling = slot, output, reason, sampling


def _columns(rows: list[_Row]) -> tuple[NDArray[Any], ...]:
    """slot, token, finish, logprob, sampling logprob: as `StepLog.append` takes them."""
    tokens = [t for r in rows for t in r.output.new_token_ids]
    logprobs = [r.output.new_logprobs.logprobs[:, 0] for r in rows if r.output.new_logprobs is not None]
    whole = len(logprobs) == len(rows)
    sampling = [r.sampling for r in rows if r.sampling is not None]
    columns: list[NDArray[Any]] = [
        np.array([r.slot for r in rows], np.uint16),
        np.array(tokens, np.uint32),
        np.array([r.reason for r in rows], np.uint8),
    ]
    if whole:
        columns.append(np.concatenate(logprobs).astype(np.float32))
        if len(sampling) == len(rows):
            columns.append(np.concatenate(sampling))
    return tuple(columns)


def _counts(rows: list[_Row]) -> NDArray[np.uint16] | None:
    counts = [len(r.output.new_token_ids) for r in rows]
    return None if all(c == 1 for c in counts) else np.array(counts, np.uint16)


_VLLM_FINISH: Final = {
    FinishReason.RUNNING: None,
    FinishReason.EOS: VllmFinish.STOP,
    FinishReason.STOP_TOKEN: VllmFinish.STOP,
    FinishReason.STOP_STRING: VllmFinish.STOP,
    FinishReason.MAX_TOKENS: VllmFinish.LENGTH,
    FinishReason.CONTEXT: VllmFinish.LENGTH,
}


def _outputs(client: int, output: EngineCoreOutput) -> Outputs:
    return {client: EngineCoreOutputs(outputs=[output])}


def _merged(parts: list[Outputs]) -> Outputs:
    """Outputs in order, as one set for each front end; the last part brings what is not an output."""
    *earlier, last = parts
    for client in {client for part in earlier for client in part}:
        before = [o for part in earlier if client in part for o in part[client].outputs]
        now = last.setdefault(client, EngineCoreOutputs())
        now.outputs = [*before, *now.outputs]
    return last


def _options(vllm_config: Any) -> dict[str, Any]:
    """Raises BadInput: no log directory, or options that this version does not know."""
    extra = vllm_config.additional_config
    options: dict[str, Any] = dict(extra.get(_CONFIG, {})) if isinstance(extra, dict) else {}
    options.setdefault("log", os.environ.get(_ENVIRONMENT))
    unknown = sorted(set(options) - _OPTIONS)
    if not options["log"] or unknown:
        raise BadInput(
            problem(
                f"unknown options {unknown}" if unknown else "no log directory is configured",
                consequence="vLLM was not started",
                remedy=f'Pass additional_config={{"{_CONFIG}": {{"log": DIRECTORY}}}}; options: {sorted(_OPTIONS)}',
            )
        )
    return options


def _check_config(vllm_config: Any) -> None:
    """Raises BadInput: a configuration under which tokens would not be drawn by position."""
    faults = []
    processors = vllm_config.model_config.logits_processors or []
    name = f"{PositionNoise.__module__}:{PositionNoise.__qualname__}"
    if not any(p is PositionNoise or p == name for p in processors):
        faults.append(f"the sampler is missing: pass logits_processors=[{name!r}]")
    if vllm_config.speculative_config is not None:
        faults.append("speculative decoding draws several tokens at a position")
    if vllm_config.use_v2_model_runner:
        faults.append("model runner V2 takes no such sampler: set VLLM_USE_V2_MODEL_RUNNER=0")
    if vllm_config.model_config.logprobs_mode != "raw_logprobs":
        faults.append(f"logprobs_mode={vllm_config.model_config.logprobs_mode}: the log holds raw_logprobs")
    if faults:
        raise BadInput(
            problem(
                f"rollouts cannot be logged with this configuration of vLLM: {'; '.join(faults)}",
                consequence="vLLM was not started",
                remedy="Change what is named; docs/vllm.md has a command line that works",
            )
        )


def _announce_weight_versions() -> None:
    """vLLM tells its engine core of new weights, and not the scheduler: pass it on, once per process."""
    original = EngineCore.set_weight_version
    if getattr(original, "announces", False):
        return

    def set_weight_version(self: Any, weight_version: str) -> None:
        if isinstance(self.scheduler, _Logging):
            self.scheduler.policy_changed(weight_version)
        original(self, weight_version)

    set_weight_version.announces = True  # type: ignore[attr-defined]
    EngineCore.set_weight_version = set_weight_version
