"""Checkpoints of model and optimizer as safetensors. The ledger's state is last: a folder that has it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from ..ledger import STATE_FILE, read_state, sync_tree, write_state

_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def save_checkpoint(parent: Path, model: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write checkpoint number `state["batches"]`; durable when this returns."""
    folder = parent / f"{int(state['batches']):06d}"
    shutil.rmtree(folder, ignore_errors=True)  # one that a crash cut short
    folder.mkdir(parents=True)
    save_model(model, str(folder / _MODEL))
    moments = {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    save_file(moments, folder / _OPTIMIZER)
    sync_tree(folder)
    write_state(folder, state)
    return folder


def last_checkpoint(parent: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = [path for path in parent.glob("[0-9]*") if (path / STATE_FILE).is_file()]
    return max(whole, default=None)


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights and moments into model and optimizer; return the ledger's state."""
    load_model(model, folder / _MODEL)
    raw = optimizer.state_dict()
    raw["state"] = {}
    for key, value in load_file(folder / _OPTIMIZER).items():
        index, _, name = key.partition(".")
        raw["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(raw)
    return read_state(folder)


def drop_older(parent: Path, keep: Path) -> None:
    """Delete checkpoints older than one that is durable and committed."""
    for path in parent.glob("[0-9]*"):
        if path.name < keep.name:
            shutil.rmtree(path, ignore_errors=True)
