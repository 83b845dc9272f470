"""What a dataset says of the scores that it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rollout_wal.dataset import Dataset
from rollout_wal.dataset.reader import read_table
from rollout_wal.dataset.schema import INDEX_SCHEMA

from .tasks import hidden_group, teacher_group


def stored_sources(dataset: Dataset, group: str) -> dict[str, str]:
    """Who computed a column group, by sample; nothing if the dataset has no such group."""
    return dict(_index(dataset, group, "source"))


def stored_checkpoint(dataset: Dataset, teacher: str, prefix: str = "") -> str | None:
    """The checkpoint of most of a teacher's scores; None if there are none."""
    groups = (teacher_group(teacher, prefix), hidden_group(teacher, prefix))
    found = Counter(digest for group in groups for _, digest in _index(dataset, group, "checkpoint") if digest)
    return found.most_common(1)[0][0] if found else None


def stored_pins(dataset: Dataset, prefix: str = "") -> dict[str, str]:
    """That checkpoint of every teacher whose scores there are."""
    starts = (teacher_group("", prefix), hidden_group("", prefix))
    teachers = {name[len(start) :] for name in dataset.groups for start in starts if name.startswith(start)}
    found = {teacher: stored_checkpoint(dataset, teacher, prefix) for teacher in sorted(teachers)}
    return {teacher: digest for teacher, digest in found.items() if digest is not None}


def _index(dataset: Dataset, group: str, column: str) -> Iterator[tuple[str, Any]]:
    for entry in (g.index for g in dataset.state.group_files if g.group == group):
        table = read_table(dataset.folder, entry, INDEX_SCHEMA, ["sample", column])
        yield from zip(table["sample"].to_pylist(), table[column].to_pylist(), strict=True)
