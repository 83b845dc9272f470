"""Loading models, and exchanging the weights of one that is in use: wholly or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ...errors import ArchitectureMismatch, BadInput, problem
from ..common.identity import architecture_digest
from .attention import ATTENTION

#: Layer kinds whose cache is attention keys and values.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal LM from a local transformers folder, in evaluation mode, with this package's attention.

    Raises:
        BadInput: not such a folder, or a model whose cache is not keys and values of attention alone.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(
            problem(
                f"{folder} is not a transformers model folder: it has no config.json",
                consequence="No model was loaded",
                remedy="Pass a folder written by save_pretrained; nothing is downloaded",
            )
        )
    with no_progress_bars():
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True, output_loading_info=True
            )
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise BadInput(
                problem(
                    f"transformers cannot load {folder} as a causal LM with exchangeable attention: {error}",
                    consequence="No model was loaded",
                    remedy="Use an attention-only causal LM with its weights in the folder",
                )
            ) from error
    # transformers would fill these with random numbers and go on.
    if absent := sorted(map(str, {*loaded["missing_keys"], *loaded["mismatched_keys"]})):
        raise BadInput(
            problem(
                f"the weights in {folder} lack, or have in another shape, {len(absent)} tensors such as {absent[:3]}",
                consequence="No model was loaded: what is absent would have been random",
                remedy="Save the model again, whole",
            )
        )
    _refuse_other_caches(model)
    own_memory(model)
    placed: nn.Module = model.to(device).eval()
    return placed


def own_memory(model: nn.Module) -> None:
    """Copy what safetensors has mapped: weights that alias a file change when someone writes into it, unnoticed:
    what is sampled or scored then is of no version that anybody knows."""
    own: dict[object, Tensor] = {}  # tied weights stay tied
    for tensor in (*model.parameters(), *model.buffers()):
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if key not in own:
            own[key] = tensor.data.clone()
        tensor.data = own[key]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, tied ones once: what `weights_digest` is taken over."""
    return dict(model.named_parameters())


def replace_weights(model: Any, source: Path | Mapping[str, Any]) -> None:
    """Copy other weights into a model.

    Args:
        source: a model folder, or tensors by the names of `model.state_dict()`; tied names may be left out.

    Raises:
        ArchitectureMismatch: configuration, names or shapes differ; the model is unchanged.
    """
    if isinstance(source, Path):
        parameter = next(model.parameters())
        other: Any = load_model(source, device=torch.device("cpu"), dtype=parameter.dtype)
        ours, theirs = (architecture_digest(m.config.to_dict()) for m in (model, other))
        if ours != theirs:
            raise _mismatch(f"{source} has the architecture digest {theirs}, the running model {ours}")
        weights: Mapping[str, Any] = other.state_dict()
    else:
        weights = source
    current: dict[str, Tensor] = model.state_dict()
    # Tied parameters are one storage under several names; any of them will do.
    names_of: dict[int, list[str]] = {}
    for name, tensor in current.items():
        names_of.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), []).append(name)
    unknown = sorted(set(weights) - set(current))
    missing = [names[0] for names in names_of.values() if not any(name in weights for name in names)]
    if unknown or missing:
        raise _mismatch(f"the weights lack {missing[:4]} and have unknown names {unknown[:4]}")
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.shape != current[name].shape:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise _mismatch(f"{name} is {found} in the new weights, {list(current[name].shape)} in the running model")
    with torch.no_grad():
        for name, value in weights.items():
            current[name].copy_(value)


def _mismatch(what: str) -> ArchitectureMismatch:
    return ArchitectureMismatch(
        problem(
            what,
            consequence="The old weights stay in force and the policy version is unchanged",
            remedy="Load weights of the same model; another model needs an engine of its own",
        )
    )


def _refuse_other_caches(model: Any) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    why = None
    if kinds:
        why = f"it has layers of kind {sorted(kinds)}"
    elif getattr(model, "_is_stateful", False):
        why = "it keeps a recurrent state"
    elif not getattr(model, "_supports_attention_backend", False):
        why = "its attention cannot be exchanged (transformers marks it so)"
    elif getattr(config, "is_encoder_decoder", False) or getattr(config, "use_bidirectional_attention", False):
        why = "it is not causal"
    elif getattr(config, "num_kv_shared_layers", 0):
        why = "some of its layers share the keys and values of others"
    if why is not None:
        raise BadInput(
            problem(
                f"this engine cannot run {type(model).__name__}: {why}",
                consequence="No model was loaded",
                remedy="Use a causal LM whose layers are all full or sliding-window attention, or another engine",
            )
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars from transformers; the process's own setting is put back."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
