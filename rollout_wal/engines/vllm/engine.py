"""vLLM as an engine of `RolloutBackend`: its engine core runs in the backend's worker, one step at a time.

    spec = EngineSpec("models/llama", "rollout_wal.engines.vllm.engine:VllmEngine.from_folder", {"max_batch": 64})
    with RolloutBackend(spec, "runs/wal", workers=1) as backend: ...

The worker logs each step and holds its outputs until they are durable, as with any engine. vLLM schedules, batches,
keeps the KV cache and computes; the tokens are drawn by the project's sampler (see `processor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from . import launch  # isort: skip  # before vLLM: it sets the environment
import torch
from vllm import SamplingParams as VllmParams

from ...errors import ArchitectureMismatch, BackendError, KvError, problem
from ...finish import finish_reason
from ...kv.layout import KvArrays
from ..base import EngineInfo, FinishReason, Request, StepOutput
from ..common.admission import check_request, check_slot
from . import support
from .connector import BlockConnector, gather, shape_of
from .draws import PLAN, plan_of
from .model import Checkpoint, folder_digest, info_of, mismatch, same_architecture, same_shapes
from .processor import PositionNoise


class VllmEngine:
    """See `Engine` for the contract. Build it with `from_folder`.

    Args:
        engine: vLLM's, with its core in this process and `PositionNoise` among its logits processors.
        folder: the model's.
        policy_version: of the weights as they are now.
    """

    def __init__(self, engine: Any, folder: Path, *, policy_version: int = 0) -> None:
        self._engine = engine
        self._core = engine.engine_core
        self._config = engine.vllm_config
        self._folder = folder
        self._policy_version = policy_version
        self._tasks = engine.get_supported_tasks()
        self._dtype: torch.dtype = self._config.model_config.dtype
        self._shapes = Checkpoint(folder).shapes()
        version = support.check(support.ENGINE_HOOKS)
        self._info = info_of(self._config, version, folder_digest(folder, self._dtype))
        self._in_process = self._config.parallel_config.world_size == 1
        self._keeps_kv = False
        self._running: dict[int, _Running] = {}
        self._slot_of: dict[str, int] = {}
        self._added = 0

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        policy_version: int = 0,
        max_batch: int = 64,
        dtype: str = "auto",
        kv_connector: bool = True,
        **engine_args: Any,
    ) -> VllmEngine:
        """Load a local model folder.

        Args:
            max_batch: requests that run at once (vLLM's max_num_seqs).
            dtype: as for vLLM.
            kv_connector: let KV be saved and loaded (`RolloutBackend(..., kv=...)`). vLLM then keeps everything in
                the cache for models with sliding windows too, so turn it off for those where memory is short.
            engine_args: further arguments of vLLM's EngineArgs: tensor_parallel_size, max_model_len,
                gpu_memory_utilization, kv_cache_memory_bytes, ...

        Raises:
            UnsupportedEngine, HookMoved: another vLLM than this was made for.
            BadInput: no such model, or arguments that would break the sampling.
        """
        support.check(support.ENGINE_HOOKS)
        folder = Path(folder)
        engine = launch.start(folder, max_batch=max_batch, dtype=dtype, kv_connector=kv_connector, **engine_args)
        return cls(engine, folder, policy_version=policy_version)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def unfinished(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """See `Engine.add`."""
        self._add(request)

    def _add(self, request: Request) -> str:
        check_request(request, self._info)
        check_slot(request.slot, used=request.slot in self._running)
        sampled = int(np.count_nonzero(request.prefix_sampled))
        tokens = np.concatenate((request.prompt, request.prefix)).tolist()
        self._added += 1
        name = f"{request.slot}.{self._added}"
        ends = request.sampling.stop_token_ids
        params = VllmParams(
            # The draw is done when vLLM comes to sample: nothing of its own sampling may touch it.
            temperature=0.0,
            max_tokens=request.sampling.max_tokens - sampled,
            # Both kinds of end as stop tokens: vLLM looks at them after each token, as the finish predicate does.
            stop_token_ids=[*ends, *(() if request.sampling.ignore_eos else self._info.eos_token_ids)],
            ignore_eos=True,
            detokenize=False,
            extra_args={PLAN: plan_of(request.slot, request)},
        )
        made = self._engine.input_processor.process_inputs(
            name, {"prompt_token_ids": tokens}, params, supported_tasks=self._tasks
        )
        self._core.add_request(made)
        self._running[request.slot] = _Running(name, request, sampled, len(tokens))
        self._slot_of[name] = request.slot
        return name

    def abort(self, slot: int) -> None:
        """See `Engine.abort`."""
        running = self._running.pop(slot, None)
        if running is not None:
            del self._slot_of[running.name]
            BlockConnector.offered.pop(running.name, None)
            self._core.abort_requests([running.name])

    def step(self) -> StepOutput:
        """See `Engine.step`.

        Raises:
            BackendError: unusable logits, or vLLM did not take the token that was drawn for it.
        """
        outputs = [o for o in self._core.get_output().outputs if o.request_id in self._slot_of]
        if not outputs:
            return _NOTHING
        tag_N, token_N, logprob_N, sampling_logprob_N = self._drawn()
        row_of = {tag: row for row, tag in enumerate(tag_N)}
        rows, slots, finish = [], [], []
        for output in outputs:
            slot = self._slot_of[output.request_id]
            row = row_of.get(slot)
            if row is None or output.new_token_ids != [token_N[row]]:
                raise BackendError(
                    problem(
                        f"vLLM returned {output.new_token_ids} for slot {slot}, for which "
                        f"{'nothing' if row is None else token_N[row]} was drawn",
                        consequence="The step was not logged, and this engine can no longer be trusted",
                        remedy="Report this with the configuration of the engine",
                    )
                )
            reason = self._running[slot].took(output.new_token_ids[0], self._info)
            if (reason is not FinishReason.RUNNING) is not (output.finish_reason is not None):
                raise BackendError(
                    problem(
                        f"vLLM says finish_reason={output.finish_reason} of slot {slot}, which is {reason.name}",
                        consequence="The step was not logged: a resume would judge otherwise than this engine",
                        remedy="Report this with the sampling parameters",
                    )
                )
            rows.append(row)
            slots.append(slot)
            finish.append(reason)
            if reason is not FinishReason.RUNNING:
                del self._slot_of[self._running.pop(slot).name]
        return StepOutput(
            np.array(slots, np.uint16),
            np.array(token_N, np.uint32)[rows],
            np.array(logprob_N, np.float32)[rows],
            np.array(sampling_logprob_N, np.float32)[rows],
            np.array(finish, np.uint8),
        )

    def load_weights(self, source: Path | Mapping[str, Any], version: int) -> None:
        """See `Engine.load_weights`. Running requests keep their tokens; their KV is computed again.

        Args:
            source: a folder with safetensors of the same model.

        Raises:
            ArchitectureMismatch: checked before anything is touched.
            BadInput: a folder that is not whole.
        """
        if not isinstance(source, Path):
            raise ArchitectureMismatch(
                problem(
                    "vLLM takes new weights from a folder, not from tensors in memory",
                    consequence="The old weights stay in force and the policy version is unchanged",
                    remedy="Save them first; RolloutBackend.update_weights does so for tensors",
                )
            )
        if not (source / "config.json").is_file():
            raise mismatch(f"{source} has no config.json")
        same_architecture(self._folder, source)
        same_shapes(self._shapes, Checkpoint(source).shapes())
        digest = folder_digest(source, self._dtype)
        self._core.collective_rpc("rollout_wal_reload", args=(str(source),))
        if not self._keeps_kv:
            # KV of the old weights must reach nobody: what runs is computed again, and what is cached is dropped.
            BlockConnector.offered.clear()
            self._core.reset_prefix_cache(reset_running_requests=True)
        self._policy_version = version
        self._info = replace(self._info, weights_digest=digest)

    # -- rollout_wal.kv.SupportsKv --------------------------------------------------------------------------------

    def kv_layout(self) -> Mapping[str, Any]:
        """See `SupportsKv.kv_layout`.

        Raises:
            KvError: several processes or several kinds of layers, which are not saved.
        """
        if not self._in_process or self._config.kv_transfer_config is None:
            raise KvError(
                problem(
                    "the KV cache of this engine is in other processes, or it was built with kv_connector=False",
                    consequence="Rollouts are resumed by prefill",
                    remedy="None is needed; KV is saved where one process runs the model",
                )
            )
        heads, block, width = shape_of(BlockConnector.caches)
        dtype = next(iter(BlockConnector.caches.values())).dtype
        half = {"kind": "attention", "kv_heads": heads, "key_dim": width // 2, "value_dim": width - width // 2}
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "layers": [half for _ in BlockConnector.caches],
            "packing": f"vllm-{self._info.engine_version}/{self._info.extras['device']}/{block}",
        }

    def kv_tokens(self, slot: int) -> int:
        """See `SupportsKv.kv_tokens`: whole blocks alone."""
        running = self._running.get(slot)
        found = self._core.engine_core.scheduler.requests.get(running.name) if running is not None else None
        if found is None:
            return 0
        # What is scheduled and not yet back counts as computed for vLLM, and not here.
        block = int(self._config.cache_config.block_size)
        computed = int(found.num_computed_tokens) - int(found.num_in_flight_tokens)
        return min(computed, int(found.num_tokens)) // block * block

    def keep_kv(self) -> None:
        """See `SupportsKv.keep_kv`."""
        self._keeps_kv = True
        self._info = replace(self._info, extras={**self._info.extras, "kv_on_update": "keep"})

    def save_kv(self, slot: int) -> KvArrays | None:
        """See `SupportsKv.save_kv`."""
        count = self.kv_tokens(slot)
        if not count:
            return None
        scheduler = self._core.engine_core.scheduler
        name = self._running[slot].name
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(name)
        tokens = np.array(list(scheduler.requests[name].all_token_ids[:count]), np.int32)
        size = int(self._config.cache_config.block_size)
        return gather(BlockConnector.caches, blocks[: count // size], tokens)

    def add_with_kv(self, request: Request, kv: KvArrays) -> None:
        """See `SupportsKv.add_with_kv`."""
        name = self._add(request)
        BlockConnector.offered[name] = kv

    def close(self) -> None:
        """Forget all requests and end vLLM. The engine must not be used afterwards."""
        for slot in list(self._running):
            self.abort(slot)
        self._core.shutdown()

    def _drawn(self) -> tuple[list[int], list[int], list[float], list[float]]:
        if self._in_process:
            assert PositionNoise.draws is not None
            d = PositionNoise.draws.last
            return d.tag_N.tolist(), d.token_N.tolist(), d.logprob_N.tolist(), d.sampling_logprob_N.tolist()
        drawn: tuple[list[int], list[int], list[float], list[float]]
        drawn = self._core.collective_rpc("rollout_wal_drawn")[0]  # all ranks draw the same
        return drawn


class _Running:
    """What the finish predicate asks of a request that runs."""

    __slots__ = ("length", "name", "request", "sampled")

    def __init__(self, name: str, request: Request, sampled: int, length: int) -> None:
        self.name, self.request, self.sampled, self.length = name, request, sampled, length

    def took(self, token: int, info: EngineInfo) -> FinishReason:
        self.sampled += 1
        self.length += 1
        return finish_reason(
            token,
            sampled=self.sampled,
            length=self.length,
            sampling=self.request.sampling,
            eos_token_ids=info.eos_token_ids,
            max_context=info.max_context,
        )


_NOTHING: Final = StepOutput(
    np.empty(0, np.uint16),
    np.empty(0, np.uint32),
    np.empty(0, np.float32),
    np.empty(0, np.float32),
    np.empty(0, np.uint8),
)
