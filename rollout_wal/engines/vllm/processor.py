"""The project's sampler as a logits processor of vLLM, for its model runners V1 and V2.

vLLM's own noise cannot carry a rollout over a resume: V1 draws from a generator that belongs to the request and dies
with it, and V2's, which is keyed by seed and position, is neither specified nor the same in other engines. Here the
token is drawn by `rollout_wal.sampling` from the model's logits, with penalties and limits that see what was sampled
before a resume; and then every other token is masked out, so that whatever vLLM does afterwards picks this one. A
request takes part if its `extra_args` hold a plan, see `draws.plan_of`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from . import supported  # noqa: F401  # isort: skip  # before what only the supported vLLM has
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as InterfaceV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as InterfaceV2

from .batch_v1 import BatchV1
from .batch_v2 import BatchV2
from .draws import Draws
from .model import context_of, eos_of

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmParams
    from vllm.config import VllmConfig


class PositionNoise(InterfaceV1, InterfaceV2):
    """See the module. vLLM makes one per model runner, and calls the methods of that runner's interface.

    One class for both, because which runner vLLM takes depends on model, configuration and version: pass it as
    `logits_processors=["rollout_wal.engines.vllm.processor:PositionNoise"]`, or `--logits-processors`, either way.

    Args:
        runner: V1 passes its device and whether its memory is pinned; V2 passes its request states.
    """

    draws: ClassVar[Draws | None] = None
    """Of the one in this process that was made last: an engine that runs in this process asks for them."""

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        rows = vllm_config.scheduler_config.max_num_seqs
        v2 = isinstance(runner[0], LogitsProcRequestState)
        if v2:
            rows = runner[0].max_num_reqs
        draws = Draws(rows, eos_of(vllm_config.model_config), context_of(vllm_config))
        self._v1: BatchV1 | None = None if v2 else BatchV1(draws)
        self._v2: BatchV2 | None = BatchV2(draws, runner[0]) if v2 else None
        PositionNoise.draws = draws

    @classmethod
    def validate_params(cls, sampling_params: VllmParams) -> None:
        """Called by vLLM's front end for each request."""
        from .request import validate

        validate(sampling_params)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Draw for the rows with a plan, and leave each of them its token alone. The others are not touched."""
        if ctx is None:
            assert self._v1 is not None
            self._v1.apply(logits)
        else:
            assert self._v2 is not None
            self._v2.apply(logits, ctx)
        return logits

    # -- model runner V1 ------------------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        """No: it decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each step: who is in the batch, and at which index."""
        assert self._v1 is not None
        self._v1.update(batch_update)

    # -- model runner V2 ------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: VllmParams) -> bool:
        """Called when a request takes a slot. Returns whether its logits are changed."""
        assert self._v2 is not None
        return self._v2.add(req_idx, sampling_params.extra_args)

    def apply_staged_writes(self) -> None:
        """Called before each step, when the tokens of added requests are on the device."""
        assert self._v2 is not None
        self._v2.join()
