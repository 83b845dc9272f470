"""Who the model is: digests of configuration, weights, tokenizer and chat template (BLAKE2b-128, lower-case hex)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Configuration that says how a model is stored, run or prompted, and nothing about what its weights mean.
_NOT_ARCHITECTURE = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_name_or_path",
        "_commit_hash",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def architecture_digest(config: Mapping[str, Any]) -> str:
    """Over `config.to_dict()`, at every depth without the fields that do not change what the weights mean."""
    return _of_json(_architecture(config))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Over names, dtypes, shapes and bytes, in order of name.

    For the digest that an engine reports, pass the parameters as the model has them in the engine's dtype:
    `dict(model.named_parameters())`, where tied parameters occur once.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(len(header).to_bytes(4, "little") + header.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Over the canonical form of tokenizer.json; "" where there is none."""
    path = folder / "tokenizer.json"
    return _of_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ""


def chat_template_digest(folder: Path) -> str:
    """Over the chat template, wherever the folder keeps it; "" where there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    path = folder / "tokenizer_config.json"
    template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    if template is None:
        return ""
    # The bytes of the template alone, so that moving it into its own file does not change the digest.
    return (
        hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
        if isinstance(template, str)
        else _of_json(template)
    )


def _architecture(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _architecture(v) for k, v in value.items() if k not in _NOT_ARCHITECTURE}
    return [_architecture(v) for v in value] if isinstance(value, (list, tuple)) else value


def _of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
