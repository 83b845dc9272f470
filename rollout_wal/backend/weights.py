"""Weights that a trainer hands over as tensors: saved, so that a resume can load them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput, MissingExtra, problem
from ..log.storage import make_dirs_durable, sync_directory


def save_weights(tensors: Mapping[str, Any], parent: Path, version: int, *, like: str) -> Path:
    """Write a new model folder in `parent`: these tensors, and the configuration of the model they belong to.

    The folder appears whole or not at all, and is durable when this returns: a policy version that is logged must be
    there to be loaded. None that is there is touched: it may be the one in force.

    Args:
        tensors: torch tensors by parameter name.
        like: folder of the model, for its configuration and tokenizer, and for which names tied tensors have in it.

    Raises:
        BadInput: a value that is no plain tensor (a DTensor, a quantized one); nothing was saved.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise MissingExtra("safetensors", "hf", "saving weights") from None
    whole = _once(tensors, _files(Path(like)).keys())
    taken = [int(p.name.partition(".")[2]) for p in parent.glob(f"{version:010d}.*")]
    folder = parent / f"{version:010d}.{max(taken, default=0) + 1}"
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    make_dirs_durable(temporary)
    for path in Path(like).iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name:
            shutil.copyfile(path, temporary / path.name)
    save_file(whole, temporary / "model.safetensors", metadata={"format": "pt"})
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(temporary)
    temporary.rename(folder)
    sync_directory(parent)
    return folder


def _once(tensors: Mapping[str, Any], model_names: Collection[str]) -> dict[str, Any]:
    """On the CPU, each once: an engine ties what is tied by itself. What the model's own folder has under several names
    is written under each of them: not every engine goes on without."""
    out: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():  # once, and each value once: it may be gathered when it is asked for
        _check_plain(name, tensor)
        key = _identity(name, tensor)
        known = first.setdefault(key, name)
        if known == name:
            whole = tensor.detach().contiguous().cpu()
            # Memory that occurs as another dtype or shape, too: safetensors writes none of it twice.
            out[name] = whole.clone() if whole.data_ptr() in written else whole
            written.add(out[name].data_ptr())
        elif name in model_names and known in model_names:
            out[name] = out[known].clone()
        elif name in model_names:
            out[name] = out.pop(known)
            first[key] = name
    return out


def _identity(name: str, tensor: Any) -> tuple[Any, ...]:
    """Equal for tied tensors. A weak reference names the memory: it keeps none, and no address is used again for it."""
    from torch.multiprocessing.reductions import StorageWeakRef

    memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    alone = (name,) if not tensor.numel() else ()
    return (memory, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride(), *alone)


def _check_plain(name: str, tensor: Any) -> None:
    """Raises BadInput: a shard, a quantized or an empty shell of a tensor, whose values are not in its own memory."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    is_tensor = isinstance(tensor, torch.Tensor)
    plain = is_tensor and not is_traceable_wrapper_subclass(tensor) and tensor.layout is torch.strided
    if plain and (tensor.data_ptr() or not tensor.numel()):
        return
    where = f" on {tensor.device}" if is_tensor else ""
    raise BadInput(
        problem(
            f"the weight {name} is a {type(tensor).__name__}{where}, and no torch tensor with its values in memory",
            consequence="Nothing was saved, and the old weights stay in force",
            remedy="Pass whole, plain tensors: full_tensor() of a DTensor, on every rank; dequantize() of a quantized "
            "one",
        )
    )


def _files(folder: Path) -> dict[str, Any]:
    """The tensors of a model folder by name: in which open file each is."""
    from safetensors import safe_open

    opened = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def same_weights(tensors: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model folder holds exactly these tensors. Of those that share memory, it need hold one.

    Raises:
        BadInput: tensors that `save_weights` would refuse.
    """
    import torch

    files = _files(folder)
    found: set[tuple[Any, ...]] = set()
    others: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        _check_plain(name, tensor)
        if name not in files:
            others.add(_identity(name, tensor))
            continue
        saved = files.pop(name).get_tensor(name)
        if tensor.dtype != saved.dtype or not torch.equal(tensor.detach().cpu(), saved):
            return False
        found.add(_identity(name, tensor))
    return bool(found) and not files and others <= found


def drop_weights(parent: Path, version: int, *, keep: str) -> None:
    """Delete the folders in `parent` of versions up to the one in force, but its own: nothing will load them again."""
    for folder in parent.glob("[0-9]*.*") if parent.is_dir() else ():
        if int(folder.name.partition(".")[0]) <= version and folder != Path(keep):
            shutil.rmtree(folder, ignore_errors=True)
