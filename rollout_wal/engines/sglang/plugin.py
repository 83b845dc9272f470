"""The write-ahead log inside an SGLang that others start: a plug-in for `sglang.Engine` and `launch_server`.

    ROLLOUT_WAL_SGLANG_LOG=runs/wal python -m sglang.launch_server --model-path MODEL

Requests whose `custom_params` name a rollout (see `common.spec`) are logged step by step in the scheduler's process,
and nothing leaves it before the records that justify it are durable. A request that names a rollout of which tokens
are logged, by this process or by one that was killed, goes on from them: its output begins with what is logged, and a
rollout that had ended is answered from the log alone. All other requests pass untouched.

Without the environment variable nothing is hooked. With it, a hook that is not in force stops the server at its start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...errors import ArchitectureMismatch, BackendError, BadInput, problem
from ..base import FinishReason
from ..common.checkpoint import Checkpoint, quick_digest, same_architecture, same_shapes
from ..common.spec import named
from ..common.step_log import DECLARED, StepLog
from ..common.support import Hook
from . import hooks, versions
from .hooks import ATTRIBUTE, REQ, Wrap
from .info import info_message, info_of
from .member import OWN, Found, Member, neutralise, refusal
from .rollouts import Rollout, Rollouts

log = logging.getLogger("sglang.rollout_wal")

LOG: Final = "ROLLOUT_WAL_SGLANG_LOG"
"""Directory of the log; each data-parallel rank has its own log in it, named by its number."""
VERSION: Final = "ROLLOUT_WAL_SGLANG_POLICY_VERSION"
"""Number of the weights that the server starts with. Default: 0."""

_MEMBER: Final = "rollout_wal_member"
_SCHEDULER: Final = "sglang.srt.managers.scheduler:Scheduler"
_STREAMER: Final = "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer"
_RECEIVER: Final = "sglang.srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"

Outputs = tuple[Any, Any, Any]
"""A sender, what it is to send, and the request that it answers."""


class HeldSender:
    """In the place of one of the scheduler's senders: what it sends waits until the log is durable."""

    def __init__(self, sender: Any, step_log: StepLog[Outputs]) -> None:
        self._sender = sender
        self._log = step_log
        self.socket = sender.socket

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        self._log.hold((self._sender, output, recv_obj))


class Logging:
    """The log of one scheduler, and what its hooks do with it."""

    def __init__(self, scheduler: Any) -> None:
        args = scheduler.server_args
        self._scheduler = scheduler
        folder = self._folder = Path(args.model_path)
        digest = quick_digest(folder)
        info = info_of(scheduler, folder, digest)
        self.deterministic = bool(args.enable_deterministic_inference)
        self.eos = info.eos_token_ids
        self.max_context = info.max_context
        self.rollouts = Rollouts(int(scheduler.max_running_requests), self.eos, self.max_context)
        setattr(scheduler.tp_worker.model_runner, ATTRIBUTE, self.rollouts)
        version = int(os.environ.get(VERSION, "0"))
        self._weights: tuple[int, str] | None = (version, digest)
        self.rollouts.version = version
        self._undeclared: tuple[int, str, str] | None = None
        """Weights in force, of which no token has been logged yet: version, digest, source."""
        scheduler.record_weight_version_change(new_version=str(version))
        self._running: dict[int, Any] = {}
        """Rollout to the request that has it."""
        self.log: StepLog[Outputs] | None = None
        if scheduler.ipc_channels.recv_from_tokenizer is not None:  # one rank of each replica talks to the front end
            self.log = StepLog.open(
                Path(os.environ[LOG]) / str(_dp_rank()),
                info=info_message(info),
                policy_version=version,
                weights_digest=digest,
                source=str(folder),
            )
            self._hold_outputs(self.log)

    def _hold_outputs(self, step_log: StepLog[Outputs]) -> None:
        channels = self._scheduler.ipc_channels
        channels = replace(
            channels,
            send_to_tokenizer=HeldSender(channels.send_to_tokenizer, step_log),
            send_to_detokenizer=HeldSender(channels.send_to_detokenizer, step_log),
        )
        self._scheduler.ipc_channels = channels
        self._scheduler.output_streamer.send_to_detokenizer = channels.send_to_detokenizer

    # -- requests -----------------------------------------------------------------------------------------------

    def created(self, req: Any, recv_req: Any) -> None:
        """A request has arrived. What is refused here is answered with its reason, as SGLang does it."""
        if why := refusal(recv_req, self.deterministic):
            req.set_finish_with_abort(why)
            return
        if "rollout" not in (recv_req.sampling_params.custom_params or {}):
            return
        try:
            member = Member(recv_req, self.eos, self.max_context)
        except BadInput as error:
            req.set_finish_with_abort(str(error))
            return
        setattr(req, _MEMBER, member)
        neutralise(req.sampling_params)

    def pulled(self, recv_reqs: list[Any]) -> None:
        """Requests have come in, on the rank that has the log: add to each what is logged of it."""
        from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput

        if self.log is None:
            return
        for recv_req in recv_reqs:
            if isinstance(recv_req, BatchTokenizedGenerateReqInput):
                self.pulled(recv_req.batch)
            if not isinstance(recv_req, TokenizedGenerateReqInput) or refusal(recv_req, True):
                continue
            extra = recv_req.sampling_params.custom_params or {}
            if "rollout" not in extra:
                continue
            with contextlib.suppress(BadInput):  # refused when it is created, on every rank
                member = Member(recv_req, self.eos, self.max_context)
                if member.spec.release:
                    self.log.forget(named(self.log.rollouts(), member.spec.release))
                logged = self.log.logged(member.id)
                attempt = member.spec.attempt
                if attempt is not None and attempt <= logged.attempts:
                    recv_req.sampling_params.custom_params = {
                        **extra,
                        OWN[-1]: f"rollout_attempt={attempt} is not newer than attempt {logged.attempts}, which is "
                        "logged; number attempts upwards, or leave the number out",
                    }
                elif len(logged) and not member.spec.prefix:
                    Found.of(logged).attach(recv_req.sampling_params)

    def queued(self, req: Any) -> bool:
        """A request enters the queue, for the first time or again. Returns whether it is to be run."""
        member: Member | None = getattr(req, _MEMBER, None)
        if member is None or member.rollout is not None or req.to_finish is not None:
            return True
        if (earlier := self._running.pop(member.id, None)) is not None:
            self._cut_off(earlier)
        if member.found is not None:
            self._replay(req, member.found)
            reason = member.ended()
            if reason is not FinishReason.RUNNING:
                self._answer(req, reason)
                return False
        slot = len(self.rollouts)  # names it in errors, where another rank has the log
        if self.log is not None:
            slot = self.log.bind(member.id, member.spec.attempt, start=member.spec.prefix or None).slot
        member.rollout = self.rollouts.add(req.rid, member.request(slot), req)
        member.rollout.committed = len(req.output_ids)
        setattr(req, ATTRIBUTE, member.rollout)
        self._running[member.id] = req
        return True

    def _cut_off(self, req: Any) -> None:
        """A client that asks again for a rollout that runs has given up on its earlier request."""
        from sglang.srt.managers.io_struct import AbortReq

        getattr(req, _MEMBER).cut_off = True
        self._scheduler.abort_request(AbortReq(rid=req.rid))

    @staticmethod
    def _replay(req: Any, found: Found) -> None:
        """What is logged becomes output that the request has already, as after a retraction."""
        from sglang.srt.utils.weight_versions import WeightVersionEvent

        count = len(found.tokens)
        req.output_ids = array("q", found.tokens)
        ends = [at for at in range(1, count) if found.versions[at] != found.versions[at - 1]]
        req.weight_version_events = [
            WeightVersionEvent(old_version=str(found.versions[at - 1]), num_output_tokens=at) for at in [*ends, count]
        ]
        if req.return_logprob:
            # Of the sampled tokens only: SGLang expects those of its input just when it prefills nothing but a prompt.
            req.logprob_start_len = -1
            req.logprob.output_token_logprobs_val = list(found.logprobs)
            req.logprob.output_token_logprobs_idx = list(found.tokens)

    def _answer(self, req: Any, reason: FinishReason) -> None:
        """It had ended before: nothing is decoded, and nothing more is logged."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH, FINISH_MATCHED_STR, FINISH_MATCHED_TOKEN

        if reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
            req.finished_reason = FINISH_MATCHED_TOKEN(matched=req.output_ids[-1])
        elif reason is FinishReason.STOP_STRING:
            if not req._check_str_based_finish(1):  # which one it was: found again in the text
                req.finished_reason = FINISH_MATCHED_STR(matched="")
        else:
            req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        req.finished_len = len(req.output_ids)
        if req.return_logprob and req.logprob.input_token_logprobs_val is None:
            req.logprob.input_token_logprobs_val, req.logprob.input_token_logprobs_idx = [], []
        self._scheduler.output_streamer.stream_output([req], req.return_logprob)

    def gone(self, req: Any) -> None:
        """A request that ended without a finish: aborted, or refused. What is logged stays, for a resume."""
        rollout = self.rollouts.remove(req.rid)
        member: Member | None = getattr(req, _MEMBER, None)
        if rollout is None or member is None:
            return
        if not member.cut_off:
            self._running.pop(member.id, None)
            if self.log is not None:
                self.log.release(member.id)

    # -- steps --------------------------------------------------------------------------------------------------

    def stepped(self, reqs: list[Any], skip_req: Any) -> None:
        """The results of a step, before they are streamed: append what is new of each rollout."""
        rows: list[tuple[int, int, float, float, int]] = []
        over: list[Any] = []
        version = -1
        for req in reqs:
            rollout: Rollout | None = getattr(req, ATTRIBUTE, None)
            if req is skip_req or rollout is None or req.rid not in self.rollouts.by_rid:
                continue
            drawn = Rollouts.commit(rollout)
            finish = _finish_of(req, rollout)
            if drawn is not None and not getattr(req, _MEMBER).cut_off:
                rows.append((rollout.request.slot, drawn.token, drawn.logprob, drawn.sampling_logprob, int(finish)))
                version = drawn.version  # of all rows: they come out of one forward pass
            if req.finished():
                over.append(req)
        if rows and self.log is not None:
            if self._undeclared is not None and version == self._undeclared[0]:
                self._declare()
            slot, token, logprob, sampling_logprob, finishes = zip(*rows, strict=True)
            self.log.append(
                np.array(slot, np.uint16),
                np.array(token, np.uint32),
                np.array(finishes, np.uint8),
                np.array(logprob, np.float32),
                np.array(sampling_logprob, np.float32),
            )
        for req in over:
            self.gone(req)

    def turn(self) -> None:
        """At the start of each turn of the scheduler's loop: let go of what is durable."""
        if self.log is None or not self.log.holding:
            return
        s = self._scheduler
        computing = not s._engine_paused and (s.last_batch is not None or s.waiting_queue or s.running_batch.reqs)
        if not computing:
            self.log.flush()
        self.let_go()

    def let_go(self) -> None:
        if self.log is not None:
            for sender, output, recv_obj in self.log.take():
                sender.send_output(output, recv_obj)

    def drain(self) -> None:
        """Before a pause, new weights or an end: everything that was sampled is durable and sent."""
        if self.log is not None:
            self.log.flush()
            self.let_go()

    # -- weights ------------------------------------------------------------------------------------------------

    def refuse_update(self, version: str | None, source: str) -> str | None:
        """Why weights cannot be replaced by these, under this version, or None."""
        if source and Path(source).is_dir():
            # SGLang looks at neither names nor shapes, and rolls back from the very folder that has failed.
            try:
                same_architecture(self._folder, Path(source))
                same_shapes(Checkpoint(self._folder).shapes(), Checkpoint(Path(source)).shapes())
            except (ArchitectureMismatch, BadInput) as error:
                return str(error)
        if version is None or not re.fullmatch(r"\d{1,18}", version):
            return (
                f"weight_version={version!r} is no number. The weights were not replaced: every token is logged with "
                "the number of its policy. Pass weight_version as digits, '17' say"
            )
        return None

    def updated(self, version: str, source: str, flushed: bool) -> None:
        """The weights have changed: said before a token is sampled under them."""
        folder, before = Path(source), str(self.rollouts.version)
        digest = quick_digest(folder) if source and folder.is_dir() else f"{DECLARED}{version}"
        # KV that was not flushed is of the old weights, and nobody can tell it from what comes.
        self._weights = (int(version), digest) if flushed else None
        if int(version) == self.rollouts.version:
            return
        self.rollouts.version = int(version)
        self._undeclared = (int(version), digest, source)
        # Overlapped: a step of the old weights may be on its way still, and its tokens are theirs.
        late = [rollout for rollout in self.rollouts.by_rid.values() if rollout.drawn]
        for rollout in late:
            _count_late(rollout.req, len(rollout.drawn), before)
        if not late:
            self._declare()

    def _declare(self) -> None:
        if self.log is not None and self._undeclared is not None:
            self.log.policy(*self._undeclared)
            self.let_go()
        self._undeclared = None

    @property
    def kv_weights(self) -> tuple[int, str] | None:
        return self._weights


def _count_late(req: Any, late: int, version: str) -> None:
    """SGLang's spans end at what was appended when the weights changed; these tokens were drawn before, too."""
    from sglang.srt.utils.weight_versions import WeightVersionEvent

    count = len(req.output_ids)
    events = req.weight_version_events
    if events and events[-1].num_output_tokens == count and events[-1].old_version == version:
        events.pop()
    events.append(WeightVersionEvent(old_version=version, num_output_tokens=count + late))


def _finish_of(req: Any, rollout: Rollout) -> FinishReason:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_MATCHED_STR, FINISHED_MATCHED_REGEX

    if not req.finished() or isinstance(req.finished_reason, FINISH_ABORT):
        return FinishReason.RUNNING  # an abort is an interruption, never a finish
    if isinstance(req.finished_reason, (FINISH_MATCHED_STR, FINISHED_MATCHED_REGEX)):
        return FinishReason.STOP_STRING
    return rollout.finish()


# -- hooks -------------------------------------------------------------------------------------------------------

_state: Logging | None = None
"""Of this process's scheduler; there is one."""


def kv_weights() -> tuple[int, str] | None:
    """Version and digest of the weights that all cached KV is of; None while that is not known."""
    return _state.kv_weights if _state is not None else None


def _created(req: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    if _state is not None:
        _state.created(req, recv_req)


def _pulled(recv_reqs: Any, receiver: Any) -> None:
    if _state is not None and recv_reqs:
        _state.pulled(recv_reqs)


def _queue(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    return original(scheduler, req, is_retracted) if _state is None or _state.queued(req) else None


def _stream(streamer: Any, reqs: Any, return_logprob: bool, skip_req: Any = None) -> None:
    if _state is not None:
        _state.stepped(reqs, skip_req)


def _ingest(scheduler: Any, stop_at_pause: bool = False) -> None:
    if _state is not None:
        _state.turn()


def _abort_output(scheduler: Any, abort_req: Any, req: Any) -> None:
    if _state is not None:
        _state.gone(req)


def _pause(result: Any, scheduler: Any, recv_req: Any) -> None:
    if _state is not None:
        _state.drain()


def _shutdown(scheduler: Any, recv_req: Any) -> None:
    if _state is not None:
        _state.drain()


def _update(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    if _state is None:
        return original(updater, recv_req)
    source = getattr(recv_req, "model_path", "") or ""
    if why := _state.refuse_update(recv_req.weight_version, source):
        return _REFUSALS[type(recv_req).__name__](why)
    _state.drain()
    result = original(updater, recv_req)
    # SGLang reports a failure too where the weights are new and only the cache could not be flushed.
    if _weight_version() == recv_req.weight_version:
        _state.updated(recv_req.weight_version, source, bool(recv_req.flush_cache) and result.success)
    elif not result.success:
        raise BackendError(
            problem(
                f"SGLang failed while it replaced the weights: {result.message}",
                consequence="Which weights it has is unknown, so it ends: no token can be attributed",
                remedy="Start it again from the weights that are logged; rollouts go on from what is logged",
            )
        )
    return result


def _label(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    result = original(scheduler, recv_req)
    if _state is not None and re.fullmatch(r"\d{1,18}", str(recv_req.new_version)):
        _state.updated(str(recv_req.new_version), "", False)
    return result


def _refused(output: str) -> Callable[[str], Any]:
    def make(why: str) -> Any:
        from sglang.srt.managers import io_struct

        return getattr(io_struct, output)(success=False, message=why)

    return make


_REFUSALS: Final = {
    f"{name}ReqInput": _refused(f"{name}ReqOutput")
    for name in (
        "UpdateWeightFromDisk",
        "UpdateWeightsFromDistributed",
        "UpdateWeightsFromTensor",
        "UpdateWeightsFromIPC",
    )
}


def _built(result: Any, scheduler: Any, server_args: Any, port_args: Any) -> None:
    """AFTER Scheduler.__init__: everything is in place, and nothing has been received yet."""
    global _state
    hooks.check_in_force((*hooks.SAMPLING, *WRAPS))
    _check_config(server_args)
    if scheduler.rust_server is not None:
        raise BadInput(
            problem(
                "SGLang runs with its Rust front end, which takes outputs past the log",
                consequence="It was not started, because rollouts could not be logged",
                remedy=f"Unset SGLANG_RUST_SERVER, or unset {LOG}",
            )
        )
    _state = Logging(scheduler)
    log.info("rollouts are logged in %s", os.environ[LOG])


WRAPS: Final = (
    Wrap(Hook(f"{_SCHEDULER}.__init__", ("self", "server_args", "port_args")), "AFTER", _built),
    Wrap(Hook(f"{_RECEIVER}._pull_raw_reqs", ("self",)), "AFTER", _pulled),
    Wrap(Hook(f"{_SCHEDULER}._create_generation_req", ("self", "recv_req", "args", "kwargs")), "AFTER", _created),
    Wrap(Hook(f"{_SCHEDULER}._add_request_to_queue", ("self", "req", "is_retracted")), "AROUND", _queue),
    Wrap(Hook(f"{_STREAMER}.stream_output", ("self", "reqs", "return_logprob", "skip_req")), "BEFORE", _stream),
    Wrap(Hook(f"{_SCHEDULER}.ingest_requests", ("self", "stop_at_pause")), "BEFORE", _ingest),
    Wrap(Hook(f"{_SCHEDULER}.send_abort_output", ("self", "abort_req", "req")), "BEFORE", _abort_output),
    Wrap(Hook(f"{_SCHEDULER}.pause_generation", ("self", "recv_req")), "AFTER", _pause),
    Wrap(Hook(f"{_SCHEDULER}.handle_shutdown", ("self", "recv_req")), "BEFORE", _shutdown),
    Wrap(Hook(f"{_SCHEDULER}.handle_update_weight_version", ("self", "recv_req")), "AROUND", _label),
    *(
        Wrap(Hook(f"{_UPDATER}.update_weights_from_{how}", ("self", "recv_req")), "AROUND", _update)
        for how in ("disk", "distributed", "tensor", "ipc")
    ),
)
#: Not hooked, and relied on.
RELIED_ON: Final = (
    Hook(f"{REQ}.set_finish_with_abort", ("self", "error_msg")),
    Hook(f"{_SCHEDULER}.abort_request", ("self", "recv_req")),
    Hook("sglang.srt.managers.scheduler_components.output_sender:SenderWrapper.send_output", ("self", "output")),
    Hook("sglang.srt.utils.weight_versions:WeightVersionEvent"),
)


def register() -> None:
    """The entry point `sglang.srt.plugins`. SGLang calls it in each of its processes, before anything is built.

    SGLang logs what an entry point raises and goes on; so that nobody runs without a log who asked for one, a process
    that cannot be hooked ends here.
    """
    if not os.environ.get(LOG):
        return
    try:
        versions.check()
        hooks.install((*hooks.SAMPLING, *WRAPS), RELIED_ON)
    except Exception as error:
        log.critical("%s", error)
        with contextlib.suppress(Exception):
            print(f"rollout-wal: {error}", flush=True)
        os._exit(1)


#: What samples elsewhere, or shows tokens on other ways than the output streamer.
_UNSUPPORTED: Final = {
    "speculative_algorithm": (None, "speculative decoding draws several tokens at a position"),
    "disaggregation_mode": ("null", "prefill and decode have a log each, and none of them the whole"),
    "pp_size": (1, "pipeline stages sample in a process of their own"),
    "dllm_algorithm": (None, "a diffusion model does not sample position by position"),
    "enable_mixed_chunk": (False, "the requests of a mixed batch cannot be told apart"),
}


def _check_config(server_args: Any) -> None:
    """Raises BadInput: a configuration under which tokens would not be drawn by position, or not be logged."""
    for name, (allowed, why) in _UNSUPPORTED.items():
        value = getattr(server_args, name, allowed)
        if value != allowed:
            raise BadInput(
                problem(
                    f"SGLang runs with {name}={value!r}: {why}",
                    consequence="It was not started, because rollouts could not be logged and resumed",
                    remedy=f"Leave {name} out, or unset {LOG}",
                )
            )


def _weight_version() -> str:
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().weight_version)


def _dp_rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().dp_rank or 0
