"""Teachers inside SGLang.

SGLang schedules, batches, keeps the KV cache and computes hidden states and logits; what is wanted of them is evaluated
in its process, where it would compute its own input log-probabilities. Those are not enough: normalised over padding of
the vocabulary too, without entropy, with one list of candidates for all positions of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .engine.source import EngineTeacherSource


class SglangTeacherSource(EngineTeacherSource):
    """A model folder that SGLang serves; `engine_args` are fields of its ServerArgs, such as attention_backend."""

    engine: ClassVar[str] = "sglang"
    runner: ClassVar[str] = "scoring.teachers.engine.sglang_runner:SglangRunner"
    #: SGLang takes prompts that are that much shorter than what the model has positions for.
    reserved: ClassVar[int] = 6
    decided: ClassVar[frozenset[str]] = frozenset(
        {
            "model_path",
            "tokenizer_path",
            "dtype",
            "kv_cache_dtype",
            "device",
            "context_length",
            "max_total_tokens",
            "chunked_prefill_size",
            "max_prefill_tokens",
            "disable_radix_cache",
            "disable_overlap_schedule",
            "skip_tokenizer_init",
            "speculative_algorithm",
            "disaggregation_mode",
            "tp_size",
            "pp_size",
            "dp_size",
            "load_format",
            "json_model_override_args",
        }
    )

    def environment(self) -> Mapping[str, str]:
        return {"HF_HUB_OFFLINE": "1"}
