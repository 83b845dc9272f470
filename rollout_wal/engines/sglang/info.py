"""What a scheduler runs: digests, vocabulary, end of sequence, context."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..base import EngineInfo
from ..common.checkpoint import config_of
from ..common.identity import architecture_digest, chat_template_digest, tokenizer_digest
from .versions import installed


def info_of(scheduler: Any, folder: Path, weights: str) -> EngineInfo:
    """Who produces the tokens. `weights`: digest of those in force."""
    model = scheduler.model_config
    args = scheduler.server_args
    return EngineInfo(
        engine="sglang",
        engine_version=installed(),
        architecture_digest=architecture_digest(config_of(folder) or model.hf_config.to_dict()),
        weights_digest=weights,
        tokenizer_digest=tokenizer_digest(folder),
        chat_template_digest=chat_template_digest(folder),
        vocab_size=int(model.vocab_size),
        # SGLang refuses longer inputs, and a resumed rollout is one.
        max_context=int(scheduler.max_req_input_len),
        eos_token_ids=tuple(sorted(int(t) for t in model.hf_eos_token_id or ())),
        dtype=str(scheduler.tp_worker.model_runner.dtype).removeprefix("torch."),
        extras={
            "torch": torch.__version__,
            "device": str(scheduler.device),
            "attention": str(args.attention_backend),
            "tensor_parallel": str(args.tp_size),
            "deterministic": str(bool(args.enable_deterministic_inference)).lower(),
        },
    )


def info_message(info: EngineInfo) -> dict[str, Any]:
    """EngineInfo as plain types, for the log."""
    return {**asdict(info), "eos_token_ids": list(info.eos_token_ids), "extras": dict(info.extras)}
