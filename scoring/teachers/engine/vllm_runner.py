"""vLLM inside a teacher's process: requests of one token each, whose prompts are what is scored.

vLLM's core runs in this process, and its model runner V1 in it or in its worker processes, one for each rank. The
runner's own look at prompt log-probabilities is replaced by ours, which sees the same hidden states at the same time.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from rollout_wal import __version__
from rollout_wal.backend.wire import Message
from rollout_wal.engines.common.support import Hook
from rollout_wal.engines.vllm import support

from .rows import Ask, Rows, head_pieces

_ASK: Final = "scoring_ask"
_RUNNER: Final = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_CLIENT: Final = "vllm.v1.engine.core_client:InprocClient"
HOOKS: Final = (
    Hook(f"{_RUNNER}._get_prompt_logprobs_dict", ("self", "hidden_states", "num_scheduled_tokens")),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.from_engine_args", ("cls", "engine_args")),
    Hook("vllm.v1.engine.input_processor:InputProcessor.process_inputs", ("self", "request_id", "prompt", "params")),
    Hook(f"{_CLIENT}.get_output", ("self",)),
    Hook(f"{_CLIENT}.add_request", ("self", "request")),
    Hook(f"{_CLIENT}.abort_requests", ("self", "request_ids")),
    Hook(f"{_CLIENT}.reset_prefix_cache", ("self",)),
    Hook(f"{_CLIENT}.collective_rpc", ("self", "method", "timeout", "args", "kwargs")),
)


class VllmRunner:
    """See `main.Runner`."""

    def __init__(self, config: Message) -> None:
        support.check(HOOKS)
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                **{
                    "enforce_eager": True,  # prefill alone: graphs of decode steps would only cost time and memory
                    "disable_log_stats": True,
                    "async_scheduling": False,
                    "max_num_seqs": min(256, config["token_budget"]),
                    **config["options"],
                    "model": config["folder"],
                    "dtype": config["dtype"],
                    "skip_tokenizer_init": True,
                    "generation_config": "vllm",
                    "max_model_len": config["max_context"],
                    "max_num_batched_tokens": config["token_budget"],
                    "kv_cache_memory_bytes": config["kv_cache_bytes"],
                    "enable_prefix_caching": config["share_prefixes"],
                    "worker_extension_cls": f"{__name__}.WorkerExtension",
                }
            )
        )
        self._core = self._engine.engine_core
        self._tasks = self._engine.get_supported_tasks()
        self._logits: int = self._core.collective_rpc("scoring_start", args=(config["vocabulary"],))[0]
        self._asked: dict[int, tuple[bytes, Message]] = {}
        self._item_of: dict[str, int] = {}
        self._serial = 0

    def describe(self) -> Message:
        config = self._engine.vllm_config
        return {
            "rollout_wal": __version__,
            "device": str(config.device_config.device_type),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logits": self._logits,
        }

    @property
    def unfinished(self) -> int:
        return len(self._item_of)

    def add(self, item: int, tokens: bytes, ask: Message, *, again: bool = False) -> None:
        self._serial += 1
        name = f"{item}.{self._serial}"
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=True if again else None,
            extra_args={_ASK: ask},
        )
        made = self._engine.input_processor.process_inputs(
            name,
            {"prompt_token_ids": np.frombuffer(tokens, "<i4").tolist()},
            params,
            supported_tasks=self._tasks,
        )
        self._core.add_request(made)
        self._asked[item] = tokens, ask
        self._item_of[name] = item

    def drop(self, items: list[int]) -> None:
        names = [name for name, item in self._item_of.items() if item in items]
        for name in names:
            del self._asked[self._item_of.pop(name)]
        if names:
            self._core.abort_requests(names)
            self._core.collective_rpc("scoring_take", args=(names,))

    def clean(self) -> None:
        if self.unfinished or not self._core.reset_prefix_cache():
            raise RuntimeError("vLLM does not let go of its prefix cache")  # zeros would be taken for KV
        self._core.collective_rpc("scoring_clean")

    def step(self) -> list[tuple[int, Message]]:
        outputs = self._core.get_output().outputs
        ended = [o.request_id for o in outputs if o.finish_reason is not None and o.request_id in self._item_of]
        if not ended:
            return []
        done = []
        for name, outcome in zip(ended, self._core.collective_rpc("scoring_take", args=(ended,))[0], strict=True):
            item = self._item_of.pop(name)
            tokens, ask = self._asked.pop(item)
            if "again" in outcome:
                # Its span's beginning was in the prefix cache, from an item that reads the same.
                self.add(item, tokens, ask, again=True)
            else:
                done.append((item, outcome))
        return done

    def head(self) -> Any:
        return self._core.collective_rpc("scoring_head")[0]


class WorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`; its methods run on every rank alike."""

    model_runner: Any

    def scoring_start(self, vocabulary: int) -> int:
        """Take hold of the model runner. Returns how many logits a position has (0: another rank has them)."""
        self._scoring: dict[str, Rows] = {}
        self._vocabulary = vocabulary
        self.model_runner._get_prompt_logprobs_dict = self._look
        logits = self._logits_of(self._a_row())
        return 0 if logits is None else int(logits.shape[-1])

    def scoring_take(self, names: list[str]) -> list[Message]:
        """What has been computed of requests, which are then forgotten."""
        nothing: Message = {"error": "vLLM ended the request without computing it"}
        rows = [self._scoring.pop(name, None) for name in names]
        return [nothing if r is None else r.outcome() for r in rows]

    def scoring_clean(self) -> None:
        _zero(self.model_runner.kv_caches)

    def scoring_head(self) -> Any:
        return head_pieces(self._logits_of, self._vocabulary, self._a_row())

    def _look(self, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        """Instead of GPUModelRunner._get_prompt_logprobs_dict: called with the hidden states of every step."""
        runner = self.model_runner
        for name, count in num_scheduled_tokens.items():
            request = runner.requests[name]
            ask = (request.sampling_params.extra_args or {}).get(_ASK)
            if ask is None:
                continue
            if name not in self._scoring:
                self._scoring[name] = Rows(Ask(**ask), self._vocabulary)
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
            rows = hidden_states[offset : offset + count]
            self._scoring[name].take(int(request.num_computed_tokens), rows, self._logits_of)
        return {}

    def _logits_of(self, hidden_NH: Any) -> Any:
        return self.model_runner.model.compute_logits(hidden_NH)

    def _a_row(self) -> Any:
        import torch

        model = self.model_runner.model_config
        return torch.zeros(1, model.get_hidden_size(), dtype=model.dtype, device=self.model_runner.device)


def _zero(caches: Any) -> None:
    for cache in caches if isinstance(caches, (list, tuple)) else ():
        _zero(cache)
    if hasattr(caches, "zero_"):
        caches.zero_()
