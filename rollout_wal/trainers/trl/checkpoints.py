"""Checkpoint folders of a trainer of TRL: which is the newest, and which are in the way of a fork."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ...log.storage import make_dirs_durable, sync_directory
from ..state_file import STATE_FILE

_PREFIX = "checkpoint-"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a trainer's output folder; one that a crash cut short is passed over. Of a run
    that was forked, the newest of the newest lineage."""
    whole = [(_lineage(p), step, str(p)) for step, p in _checkpoints(output_dir) if (p / STATE_FILE).is_file()]
    return max(whole)[2] if whole else None


def set_aside(output_dir: str | Path, *, after: int, below: int) -> None:
    """Before a fork: move checkpoints that it leaves behind into a folder `lineage-N`, where nobody counts them.

    In their place they would be in the way: to transformers, checkpoints with lower numbers are the older ones, and the
    first to be deleted.

    Args:
        after: those of later optimizer steps than this one.
        below: those of lineages below this one. Of one that a crash cut short none is known: it goes, too.
    """
    for step, path in _checkpoints(output_dir):
        lineage = _lineage(path)
        if step <= after or lineage >= below:
            continue
        folder = path.parent / f"lineage-{lineage}"
        make_dirs_durable(folder)
        taken = len(list(folder.glob(f"{path.name}*")))
        path.rename(folder / (f"{path.name}.{taken}" if taken else path.name))
        sync_directory(folder)
        sync_directory(path.parent)


def _checkpoints(output_dir: str | Path) -> Iterator[tuple[int, Path]]:
    """(optimizer step, folder) of each, also of those that are not whole."""
    for path in sorted(Path(output_dir).glob(f"{_PREFIX}*")):
        if path.name.removeprefix(_PREFIX).isdecimal():
            yield int(path.name.removeprefix(_PREFIX)), path


def _lineage(checkpoint: Path) -> int:
    try:
        return int(json.loads((checkpoint / STATE_FILE).read_text()).get("lineage", 0))
    except (OSError, ValueError):
        return 0
