"""What a vLLM engine runs: digests, vocabulary, end of sequence, context. Read from its configuration and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..base import EngineInfo
from ..common.checkpoint import Checkpoint, config_of, mismatch, quick_digest, same_architecture, same_shapes
from ..common.identity import architecture_digest, chat_template_digest, tokenizer_digest, weights_digest

__all__ = [
    "Checkpoint",
    "context_of",
    "eos_of",
    "folder_digest",
    "info_message",
    "info_of",
    "mismatch",
    "quick_digest",
    "routes_shape",
    "same_architecture",
    "same_shapes",
]


def eos_of(model_config: Any) -> tuple[int, ...]:
    """The model's ends of sequence: the generation configuration's, else the model's."""
    generation: Mapping[str, Any] = model_config.try_get_generation_config() or {}
    found = generation.get("eos_token_id")
    if found is None:
        found = getattr(model_config.hf_text_config, "eos_token_id", None)
    return tuple(int(t) for t in (found if isinstance(found, (list, tuple)) else [found]) if t is not None)


def context_of(vllm_config: Any) -> int:
    """Tokens that a request may have, prompt and output together."""
    return int(vllm_config.model_config.max_model_len)


def routes_shape(vllm_config: Any) -> list[int] | None:
    """[layers, experts of a token] of the routes that vLLM returns; None where it returns none."""
    if not vllm_config.aux_output_config.enable_return_routed_experts:
        return None
    model = vllm_config.model_config
    return [int(model.get_total_num_hidden_layers()), int(model.get_num_experts_per_tok())]


def info_of(vllm_config: Any, version: str, weights: str) -> EngineInfo:
    """Who produces the tokens.

    Args:
        version: of vLLM.
        weights: digest of the weights in force.
    """
    model = vllm_config.model_config
    folder = Path(model.model)
    return EngineInfo(
        engine="vllm",
        engine_version=version,
        architecture_digest=architecture_digest(config_of(folder) or model.hf_config.to_dict()),
        weights_digest=weights,
        tokenizer_digest=tokenizer_digest(Path(model.tokenizer)),
        chat_template_digest=chat_template_digest(Path(model.tokenizer)),
        vocab_size=int(model.get_vocab_size()),
        max_context=context_of(vllm_config),
        eos_token_ids=eos_of(model),
        dtype=str(model.dtype).removeprefix("torch."),
        extras={
            "torch": torch.__version__,
            "device": str(vllm_config.device_config.device_type),
            "tensor_parallel": str(vllm_config.parallel_config.tensor_parallel_size),
            "quantization": str(model.quantization or ""),
            "model_runner": "v2" if vllm_config.use_v2_model_runner else "v1",
        },
    )


def folder_digest(folder: Path, dtype: torch.dtype) -> str:
    """The digest of a checkpoint's weights in an engine's dtype. vLLM repacks them, so its parameters tell nothing."""
    return weights_digest(Checkpoint(folder, dtype))


def info_message(info: EngineInfo) -> dict[str, Any]:
    """EngineInfo as plain types, for the log."""
    return {**asdict(info), "eos_token_ids": list(info.eos_token_ids), "extras": dict(info.extras)}
