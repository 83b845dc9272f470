"""Teachers inside vLLM.

vLLM schedules, batches, keeps the KV cache and computes hidden states and logits; what is wanted of them is evaluated
inside its worker, where it would compute its own `prompt_logprobs`. Those are not enough: they are of temperature 1,
normalised over padding of the vocabulary too, without entropy or hidden states, and candidates need model runner V2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

from .engine.source import EngineTeacherSource


class VllmTeacherSource(EngineTeacherSource):
    """A model folder that vLLM serves; `engine_args` are fields of its EngineArgs, such as tensor_parallel_size."""

    engine: ClassVar[str] = "vllm"
    runner: ClassVar[str] = "scoring.teachers.engine.vllm_runner:VllmRunner"
    decided: ClassVar[frozenset[str]] = frozenset(
        {
            "model",
            "dtype",
            "max_model_len",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "enable_prefix_caching",
            "worker_extension_cls",
            "scheduler_cls",
            "logits_processors",
            "speculative_config",
            "kv_transfer_config",
            "pipeline_parallel_size",
            "data_parallel_size",
            "tokenizer",
            "skip_tokenizer_init",
            "load_format",
            "hf_overrides",
        }
    )

    def environment(self) -> Mapping[str, str]:
        return {
            # The engine's core in its process, model runner V1, and no call home.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
