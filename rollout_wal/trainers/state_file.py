"""The ledger's state inside a trainer's checkpoint folder, and how a checkpoint that others wrote becomes durable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import CheckpointMismatch, problem
from ..log.storage import make_dirs_durable, sync_directory

#: The ledger's file inside a trainer's checkpoint folder, on rank 0; see `write_state`.
STATE_FILE: Final = "rollout_wal.json"


def write_state(folder: Path, state: Mapping[str, Any], *, rank: int = 0) -> None:
    """Put the ledger's state into a checkpoint folder, whole or not at all."""
    make_dirs_durable(folder)
    path = _state_path(folder, rank)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(folder)


def read_state(folder: Path, *, rank: int = 0) -> dict[str, Any]:
    """The ledger's state from a checkpoint folder.

    Raises:
        CheckpointMismatch: there is none, or it cannot be read: this checkpoint was not made with this backend.
    """
    path = _state_path(folder, rank)
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(
            problem(
                f"{path} cannot be read: {error}",
                consequence="Which rollouts the checkpoint contains is not known, so nothing was resumed",
                remedy="Resume from a checkpoint that was made with this backend, or start a new run",
            )
        ) from error
    assert isinstance(state, dict)
    return state


def drop_state(folder: Path) -> None:
    """Before a checkpoint is written over: cut short by a crash, it must not pass for whole by the state of the old."""
    path = _state_path(folder, 0)
    if path.exists():
        path.unlink()
        sync_directory(folder)


def _state_path(folder: Path, rank: int) -> Path:
    return folder / (STATE_FILE if rank == 0 else f"rollout_wal.{rank}.json")


def sync_tree(folder: Path) -> None:
    """Make a checkpoint durable that others wrote: the log is about to forget what it would take to repeat it."""
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(Path(root))
    sync_directory(folder.parent)
