"""The log of one scheduler that others started, and what its hooks do with it.

A request arrives (`pulled` on the rank with the log, then `created` on every rank), enters the queue (`queued`), has a
token after each step (`stepped`), and ends (`gone`). What is sent meanwhile is held: see `outputs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...errors import BadInput
from ..base import FinishReason
from ..common.checkpoint import quick_digest
from ..common.spec import named, not_accepted
from ..common.step_log import StepLog
from . import replay
from .hooks import ATTRIBUTE
from .info import info_message, info_of
from .member import OWN, Found, Member, neutralise, refusal
from .options import Options
from .outputs import Held, Outputs
from .retraction import RetractedKv
from .rollouts import Rollout, Rollouts
from .weights import Weights

_MEMBER: Final = "rollout_wal_member"
_RETRACTED_KV_BYTES: Final = 1 << 30


class ServerLog:
    """See the module.

    Args:
        path: of the log. Only one rank of each replica has it, the one that talks to the front end.
        options: `options.log` is not looked at.
    """

    def __init__(self, scheduler: Any, path: Path, options: Options) -> None:
        args = scheduler.server_args
        self._scheduler = scheduler
        folder = Path(args.model_path)
        digest = quick_digest(folder)
        info = info_of(scheduler, folder, digest)
        self._deterministic = bool(args.enable_deterministic_inference)
        self._eos = info.eos_token_ids
        self._max_context = info.max_context
        self.rollouts = Rollouts(int(scheduler.max_running_requests), self._eos, self._max_context)
        setattr(scheduler.tp_worker.model_runner, ATTRIBUTE, self.rollouts)
        self.weights = Weights(folder, options.policy_version, digest, self.rollouts, self._declare)
        scheduler.record_weight_version_change(new_version=str(options.policy_version))
        self.retracted = RetractedKv(scheduler, _RETRACTED_KV_BYTES)
        self._running: dict[int, Any] = {}
        """Rollout to the request that has it."""
        self.log: StepLog[Held] | None = None
        self._outputs: Outputs | None = None
        if scheduler.ipc_channels.recv_from_tokenizer is not None:
            self.log = StepLog.open(
                path,
                info=info_message(info),
                policy_version=options.policy_version,
                weights_digest=digest,
                source=str(folder),
                segment_bytes=options.segment_bytes,
                policy=options.sync,
                take_over=options.take_over,
                keep=options.keep,
            )
            self._outputs = Outputs(scheduler, self.log)

    # -- requests -----------------------------------------------------------------------------------------------

    def pulled(self, recv_reqs: list[Any]) -> None:
        """Requests have come in, on the rank that has the log: add to each what is logged of it."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

        if self.log is None:
            return
        coming: dict[int, int] = {}
        for recv_req in _one_by_one(recv_reqs):
            if isinstance(recv_req, TokenizedGenerateReqInput) and _names_one(recv_req):
                # What is refused here is refused, with the reason, when it is created: on every rank.
                if refusal(recv_req, True):
                    continue
                with contextlib.suppress(BadInput):
                    self._look_up(recv_req, self.log, coming)

    def _look_up(self, recv_req: Any, log: StepLog[Held], coming: dict[int, int]) -> None:
        """
        Args:
            coming: the newest attempt of each rollout that was pulled together with this one and has no slot yet.
        """
        member = Member(recv_req, self._eos, self._max_context)
        if member.spec.release:
            log.forget(named(log.rollouts(), member.spec.release))
        logged = log.logged(member.id)
        attempt, last = member.spec.attempt, max(logged.attempts, coming.get(member.id, 0))
        params = recv_req.sampling_params
        if attempt is not None and attempt <= last:
            params.custom_params = {
                **params.custom_params,
                OWN[-1]: not_accepted(
                    f"rollout_attempt={attempt} is not newer than attempt {last}, which came before it",
                    "Number attempts upwards, or leave the number out",
                ),
            }
            return
        coming[member.id] = last + 1 if attempt is None else attempt
        if len(logged) and not member.spec.prefix:
            Found.of(logged).attach(params)

    def created(self, req: Any, recv_req: Any) -> None:
        """A request has arrived. What is refused here is answered with its reason, as SGLang does it."""
        if why := refusal(recv_req, self._deterministic):
            req.set_finish_with_abort(why)
            return
        if not _names_one(recv_req):
            return
        try:
            member = Member(recv_req, self._eos, self._max_context)
        except BadInput as error:
            req.set_finish_with_abort(str(error))
            return
        setattr(req, _MEMBER, member)
        neutralise(req.sampling_params)

    def queued(self, req: Any) -> bool:
        """A request enters the queue, for the first time or again. Returns whether it is to be run."""
        member: Member | None = getattr(req, _MEMBER, None)
        if member is None or member.rollout is not None or req.to_finish is not None:
            return True
        reason = member.ended()
        slot = len(self.rollouts)  # names it in errors, where another rank has the log
        if self.log is not None and reason is FinishReason.RUNNING:
            try:
                slot = self.log.bind(member.id, member.spec.attempt, start=member.spec.prefix or None).slot
            except BadInput as error:
                # Raised here it would end the scheduler, and with it everybody's requests.
                req.set_finish_with_abort(str(error))
                return True
        if (earlier := self._running.pop(member.id, None)) is not None:
            self._cut_off(earlier)
        if member.found is not None:
            replay.give_output(req, member.found)
        if reason is not FinishReason.RUNNING:
            replay.end(req, reason)
            self._scheduler.output_streamer.stream_output([req], req.return_logprob)
            return False
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

    def gone(self, req: Any) -> None:
        """A request has ended: finished, aborted, or refused. What is logged of one unfinished stays, for a resume."""
        rollout = self.rollouts.remove(req.rid)
        self.retracted.forget(req.rid)
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
            finish = replay.finish_of(req, rollout)
            if drawn is not None and not getattr(req, _MEMBER).cut_off:
                rows.append((rollout.request.slot, drawn.token, drawn.logprob, drawn.sampling_logprob, int(finish)))
                version = drawn.version  # of all rows: they come out of one forward pass
            if drawn is not None and self.retracted:
                self.retracted.forget(req.rid)
            if req.finished():
                over.append(req)
        if rows and self.log is not None:
            self.weights.logging(version)
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
        """At the start of each turn of the scheduler's loop."""
        if self._outputs is not None:
            self._outputs.turn()

    def drain(self) -> None:
        """Before a pause, new weights or an end: everything that was sampled is durable and sent."""
        if self._outputs is not None:
            self._outputs.drain()

    def updated(self, version: str, source: str, flushed: bool) -> None:
        """The weights have changed; see `Weights.updated`."""
        self.retracted.clear(keeping=flushed)
        self.weights.updated(version, source, flushed)

    def _declare(self, version: int, digest: str, source: str) -> None:
        if self.log is not None and self._outputs is not None:
            self.log.policy(version, digest, source)
            self._outputs.let_go()


def _one_by_one(recv_reqs: list[Any]) -> Iterator[Any]:
    from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput

    for recv_req in recv_reqs:
        if isinstance(recv_req, BatchTokenizedGenerateReqInput):
            yield from recv_req.batch
        else:
            yield recv_req


def _names_one(recv_req: Any) -> bool:
    return "rollout" in (recv_req.sampling_params.custom_params or {})
