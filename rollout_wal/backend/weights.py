"""Weights that a trainer hands over as tensors: saved, so that a resume can load them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingExtra
from ..log.storage import make_dirs_durable, sync_directory


def save_weights(tensors: Mapping[str, Any], parent: Path, version: int, *, like: str) -> Path:
    """Write a new model folder in `parent`: these tensors, and the configuration of the model they belong to.

    The folder appears whole or not at all, and is durable when this returns: a policy version that is logged must be
    there to be loaded. None that is there is touched: it may be the one in force.

    Args:
        tensors: torch tensors by parameter name.
        like: folder of the model, for its configuration and tokenizer.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise MissingExtra("safetensors", "hf", "saving weights") from None
    taken = [int(p.name.partition(".")[2]) for p in parent.glob(f"{version:010d}.*")]
    folder = parent / f"{version:010d}.{max(taken, default=0) + 1}"
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    make_dirs_durable(temporary)
    for path in Path(like).iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name:
            shutil.copyfile(path, temporary / path.name)
    save_file(_once(tensors), temporary / "model.safetensors", metadata={"format": "pt"})
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(temporary)
    temporary.rename(folder)
    sync_directory(parent)
    return folder


def _once(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """On the CPU, each once: safetensors writes no memory twice, and an engine ties what is tied by itself."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        alone = (name,) if not tensor.numel() else ()
        first.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), *alone), name)
    return {name: tensors[name].detach().contiguous().cpu() for name in first.values()}


def same_weights(tensors: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model folder holds exactly these tensors. Of those that share memory, it need hold one."""
    import torch
    from safetensors import safe_open

    found: set[int] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                mine, saved = tensors.get(name), file.get_tensor(name)
                if mine is None or mine.dtype != saved.dtype or not torch.equal(mine.detach().cpu(), saved):
                    return False
                found.add(mine.data_ptr())
    return bool(found) and all(t.data_ptr() in found for t in tensors.values())


def drop_weights(parent: Path, version: int, *, keep: str) -> None:
    """Delete the folders in `parent` of versions up to the one in force, but its own: nothing will load them again."""
    for folder in parent.glob("[0-9]*.*") if parent.is_dir() else ():
        if int(folder.name.partition(".")[0]) <= version and folder != Path(keep):
            shutil.rmtree(folder, ignore_errors=True)
