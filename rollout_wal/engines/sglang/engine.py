"""SGLang behind the common protocol: its scheduler, model runner and KV cache, in this process.

The worker of a `RolloutBackend` then *is* the scheduler's process, and logs before anything leaves it, as it does for
any engine. SGLang batches, prefills in chunks, shares prefixes and retracts under memory pressure by its own rules.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import BackendError, KvError, problem
from ...kv.layout import KvArrays
from ..base import EngineInfo, FinishReason, Request, StepOutput
from ..common.admission import check_request, check_slot
from ..common.checkpoint import Checkpoint, model_folder, same_architecture, same_shapes
from ..common.identity import weights_digest
from . import hooks, versions
from .info import info_of
from .retraction import RETRACTION, RetractedKv
from .rollouts import Rollout, Rollouts

versions.check()
# Imported by the process that workers are forked from, so that each starts in the time of a model load.
from sglang.srt.managers.io_struct import (  # noqa: E402
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
    TokenizedGenerateReqInput,
    UpdateWeightFromDiskReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams as SglangSamplingParams  # noqa: E402

from .kv import SchedulerKv  # noqa: E402
from .scheduler import RELIED_ON, EmbeddedScheduler  # noqa: E402
from .start import refuse_arguments, start_scheduler  # noqa: E402


class SglangEngine:
    """See `Engine` for the contract. Build it with `from_folder`; one per process."""

    def __init__(
        self,
        scheduler: EmbeddedScheduler,
        folder: Path,
        max_batch: int,
        policy_version: int,
        retracted_kv_bytes: int,
    ) -> None:
        self._scheduler = scheduler
        self._folder = folder
        self._shapes = Checkpoint(folder).shapes()
        self._policy_version = policy_version
        self._max_batch = max_batch
        self._waiting: deque[tuple[Request, KvArrays | None]] = deque()
        self._kv: SchedulerKv | None = None
        self._retracted = RetractedKv(scheduler, retracted_kv_bytes)
        self._rid_of: dict[int, str] = {}
        self._serial = 0
        self._ran = False
        runner = scheduler.tp_worker.model_runner
        self._model = runner.model
        self._info = info_of(scheduler, folder, self._digest())
        self._rollouts = Rollouts(max_batch, self._info.eos_token_ids, self._info.max_context)
        setattr(runner, hooks.ATTRIBUTE, self._rollouts)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch: int = 64,
        prefill_chunk: int = 2048,
        kv_tokens: int = 32768,
        policy_version: int = 0,
        retracted_kv_bytes: int = 1 << 30,
        server_args: Mapping[str, Any] | None = None,
    ) -> SglangEngine:
        """Load a local model folder; nothing is downloaded.

        Args:
            dtype: of weights and KV: float32, bfloat16, float16.
            max_batch: requests that run at once; more wait in order of arrival.
            prefill_chunk: tokens of a prefill that one step computes at most.
            kv_tokens: size of the KV cache. SGLang retracts requests that no longer fit, and resumes them later.
            retracted_kv_bytes: of host memory, for the KV of retracted requests; beyond that they are prefilled again.
            server_args: any other fields of SGLang's ServerArgs.

        Raises:
            UnsupportedEngine, HookMoved: another SGLang than the one that this was made for.
            BadInput: no such model, or `server_args` that change what is drawn (see `refuse_arguments`).
        """
        versions.check()
        folder = model_folder(folder)
        refuse_arguments(server_args or {})
        hooks.install((*hooks.SAMPLING, *RETRACTION), RELIED_ON)
        logging.getLogger("sglang").setLevel(logging.WARNING)
        scheduler = start_scheduler(
            {
                "model_path": str(folder),
                "device": device,
                "dtype": dtype,
                "max_running_requests": max_batch,
                "chunked_prefill_size": prefill_chunk,
                "max_total_tokens": kv_tokens,
                **(server_args or {}),
            }
        )
        return cls(scheduler, folder, max_batch, policy_version, retracted_kv_bytes)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def unfinished(self) -> int:
        return len(self._rid_of) + len(self._waiting)

    def add(self, request: Request, kv: KvArrays | None = None) -> None:
        """See `Engine.add`. `kv`: see `add_with_kv`."""
        check_request(request, self._info)
        waiting = any(other.slot == request.slot for other, _ in self._waiting)
        check_slot(request.slot, used=waiting or request.slot in self._rid_of)
        self._waiting.append((request, kv))

    def abort(self, slot: int) -> None:
        """See `Engine.abort`."""
        rid = self._rid_of.pop(slot, None)
        if rid is None:
            self._waiting = deque(item for item in self._waiting if item[0].slot != slot)
            return
        self._rollouts.remove(rid)
        self._retracted.forget(rid)
        self._scheduler.abort_request(AbortReq(rid=rid))
        self._scheduler.ended_by_itself()

    def step(self) -> StepOutput:
        """See `Engine.step`.

        Raises:
            BackendError: unusable logits, or a request that SGLang ended by itself; both name the slot. The engine must
                not be used further: SGLang's scheduler is in the middle of a step.
        """
        if self._ran and not self._rid_of and self._scheduler.is_fully_idle():
            self._scheduler.on_idle()  # as SGLang's own loop does: its estimates of what requests need start anew
            self._ran = False
        while self._waiting and len(self._rid_of) < self._max_batch:
            request, kv = self._waiting.popleft()
            if kv is not None and self._kv is not None:
                self._kv.restore(kv)
            self._hand_over(request)
        if not self._rid_of and self._scheduler.is_fully_idle():
            return _NOTHING
        self._ran = True
        rows = []
        for req in self._scheduler.turn():
            rollout: Rollout | None = getattr(req, hooks.ATTRIBUTE, None)
            if rollout is None or req.rid not in self._rollouts.by_rid:
                continue  # aborted: it ran once more to free its memory
            drawn = Rollouts.commit(rollout)
            if drawn is None:
                continue
            if self._retracted:
                self._retracted.forget(req.rid)
            finish = rollout.finish()
            rows.append((rollout.request.slot, drawn.token, drawn.logprob, drawn.sampling_logprob, int(finish)))
            if finish is not FinishReason.RUNNING:
                self._rollouts.remove(req.rid)
                del self._rid_of[rollout.request.slot]
        self._refuse_ended()
        if not rows:
            return _NOTHING
        slot, token, logprob, sampling_logprob, finish_ = zip(*rows, strict=True)
        return StepOutput(
            np.array(slot, np.uint16),
            np.array(token, np.uint32),
            np.array(logprob, np.float32),
            np.array(sampling_logprob, np.float32),
            np.array(finish_, np.uint8),
        )

    def load_weights(self, source: Path | Mapping[str, Any], version: int) -> None:
        """See `Engine.load_weights`. Running requests are retracted and keep their tokens; their KV is computed again.

        `source`: a model folder, or tensors by the names of the folder that the engine was built from.

        Raises:
            ArchitectureMismatch, BadInput: another model's weights, or a folder that is not whole; nothing has changed.
            BackendError: SGLang failed while it loaded them; the engine must not be used further.
        """
        if isinstance(source, Path):
            same_architecture(self._folder, source)
            shapes = Checkpoint(source).shapes()
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        # SGLang checks neither names nor shapes, and rolls back from the very folder that has failed.
        same_shapes(self._shapes, shapes)
        self._retracted.clear(keeping=False)
        self._scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
        try:
            if isinstance(source, Path):
                result = self._scheduler.weight_updater.update_weights_from_disk(
                    UpdateWeightFromDiskReqInput(
                        model_path=str(source), load_format="auto", weight_version=str(version)
                    )
                )
                if not result.success:
                    raise BackendError(
                        problem(
                            f"SGLang did not load the weights in {source}: {result.message}",
                            consequence="Which weights it has is unknown; the engine must not be used further",
                            remedy="Start the engine again from the weights that are logged",
                        )
                    )
            else:
                with torch.no_grad():
                    self._model.load_weights(iter(source.items()))
                self._scheduler.record_weight_version_change(new_version=str(version))
                self._scheduler.flush_cache()
        finally:
            self._scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
            self._retracted.clear()
        self._policy_version = version
        # SGLang has dropped the KV of the old weights; what still waits to be restored is of them too.
        self._waiting = deque((request, None) for request, _ in self._waiting)
        self._info = replace(self._info, weights_digest=self._digest())

    # -- rollout_wal.kv.SupportsKv --------------------------------------------------------------------------------

    def kv_layout(self) -> Mapping[str, Any]:
        """See `SupportsKv.kv_layout`. Raises KvError: a cache that this package cannot read."""
        return self._scheduler_kv().describe()

    def kv_tokens(self, slot: int) -> int:
        """See `SupportsKv.kv_tokens`."""
        rid = self._rid_of.get(slot)
        if rid is None:
            return 0
        kept = self._retracted.of(rid)
        return len(kept) if kept is not None else self._scheduler_kv().tokens(self._rollouts.by_rid[rid].req)

    def keep_kv(self) -> None:
        """See `SupportsKv.keep_kv`.

        Raises:
            KvError: always. SGLang's radix cache would hand KV of the old weights to requests of the new.
        """
        raise KvError(
            problem(
                "SGLang shares KV between requests, whatever weights computed it",
                consequence="KV is neither saved nor loaded; rollouts are resumed by prefill",
                remedy='Use on_update="recompute"',
            )
        )

    def save_kv(self, slot: int) -> KvArrays | None:
        """See `SupportsKv.save_kv`."""
        rid = self._rid_of.get(slot)
        if rid is None:
            return None
        return self._retracted.of(rid) or self._scheduler_kv().save(self._rollouts.by_rid[rid].req)

    def add_with_kv(self, request: Request, kv: KvArrays) -> None:
        """See `SupportsKv.add_with_kv`. It goes into the radix cache when the request joins."""
        kv.check(self._scheduler_kv().layout)
        self.add(request, kv)

    def _scheduler_kv(self) -> SchedulerKv:
        if self._kv is None:
            self._kv = SchedulerKv(self._scheduler)
        return self._kv

    def close(self) -> None:
        """Forget all requests. SGLang's memory goes with the process."""
        self._waiting.clear()
        for slot in list(self._rid_of):
            self.abort(slot)

    # -- between the two ----------------------------------------------------------------------------------------

    def _hand_over(self, request: Request) -> None:
        # SGLang aborts by prefix of the id: of a fixed width, none is the prefix of another.
        rid = f"{self._serial:016x}"
        self._serial += 1
        tokens = array("q", np.concatenate((request.prompt, request.prefix)).astype(np.int64).tobytes())
        sampled = int(np.count_nonzero(request.prefix_sampled))
        rollout = self._rollouts.add(rid, request, None)
        self._scheduler.process_input_requests(
            [
                TokenizedGenerateReqInput(
                    rid=rid,
                    input_text="",
                    input_ids=tokens,
                    input_embeds=None,
                    mm_inputs=None,
                    token_type_ids=None,
                    # Greedy and unpenalised: the logits stay the model's own, and the draw is ours.
                    sampling_params=SglangSamplingParams(
                        max_new_tokens=request.sampling.max_tokens - sampled, temperature=1.0, top_k=1
                    ),
                    return_logprob=False,
                    logprob_start_len=-1,
                    top_logprobs_num=0,
                    token_ids_logprob=None,
                    stream=False,
                )
            ]
        )
        req = next((r for r in reversed(self._scheduler.waiting_queue) if r.rid == rid), None)
        if req is None or req.to_finish is not None:
            self._rollouts.remove(rid)
            raise BackendError(
                problem(
                    f"slot {request.slot}: SGLang refused a request of {len(tokens)} tokens: "
                    f"{getattr(req, 'to_finish', None) or self._scheduler.ended_by_itself()}",
                    consequence="The request does not run",
                    remedy="Give the engine more kv_tokens, or shorter prompts",
                )
            )
        rollout.req = req
        setattr(req, hooks.ATTRIBUTE, rollout)
        self._rid_of[request.slot] = rid

    def _refuse_ended(self) -> None:
        for abort in self._scheduler.ended_by_itself():
            rollout = self._rollouts.by_rid.get(str(abort.rid))
            if rollout is not None:
                raise BackendError(
                    problem(
                        f"slot {rollout.request.slot}: SGLang ended the request by itself: {abort.finished_reason}",
                        consequence="It has no more tokens, and has not finished either",
                        remedy="Give the engine more kv_tokens: one rollout alone has to fit",
                    )
                )

    def _digest(self) -> str:
        return weights_digest(dict(self._model.named_parameters()))


_NOTHING = StepOutput(
    np.empty(0, np.uint16),
    np.empty(0, np.uint32),
    np.empty(0, np.float32),
    np.empty(0, np.float32),
    np.empty(0, np.uint8),
)
