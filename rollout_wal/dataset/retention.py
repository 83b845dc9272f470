"""Letting old samples go: which, by a rule; and the files that nothing needs any more."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DatasetError, problem
from .manifest import MANIFEST_FOLDER, Change, Manifest
from .new_files import INDEX_FOLDER, METADATA_FOLDER, PAYLOAD_FOLDER, TOMBSTONE_FOLDER, NewFiles
from .reader import Dataset, read_table
from .schema import INDEX_SCHEMA
from .writer import CommitInfo, DatasetWriter

#: Files that no manifest names may belong to a commit that is being made. A commit takes seconds.
GRACE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Retention:
    """Which samples stay. One that fails any rule that is given goes.

    Args:
        start_version_min: the policy version that it started under is at least this; samples without one stay.
        age_s_max: sealed no longer ago than this.
        tokens_max: only so many tokens in all; the samples that were sealed last stay.
    """

    start_version_min: int | None = None
    age_s_max: float | None = None
    tokens_max: int | None = None

    def keep(self, metadata: Any, now: datetime) -> NDArray[np.bool_]:
        """bool [N]: which rows stay."""
        out = np.ones(metadata.num_rows, dtype=np.bool_)
        if self.start_version_min is not None:
            start = metadata["policy_version_start"].fill_null(self.start_version_min).to_numpy()
            out &= start >= self.start_version_min
        if self.age_s_max is not None:
            oldest = np.datetime64((now - timedelta(seconds=self.age_s_max)).replace(tzinfo=None), "us")
            out &= metadata["sealed_at"].to_numpy() >= oldest
        if self.tokens_max is not None:
            tokens = metadata["prompt_length"].to_numpy().astype(np.int64) + metadata["response_length"].to_numpy()
            newer = np.cumsum(np.where(out, tokens, 0)[::-1])[::-1]
            out &= newer <= self.tokens_max
        return out


_COLUMNS = ["sample", "policy_version_start", "sealed_at", "prompt_length", "response_length"]


def retain(writer: DatasetWriter, rule: Retention) -> CommitInfo:
    """Apply a retention rule: `added` of the result names the samples that went.

    A fragment of which no sample stays is retired: its payload is no longer part of the dataset, and `vacuum` deletes
    it. Its metadata stays, so that none of its rollouts is sealed again. Of other fragments single rows are tombstoned.

    Raises:
        DatasetError: a rule that says nothing.
        DatasetPoisoned, and whatever the writer's `check_fence` raises: as for sealing.
    """
    if rule == Retention():
        raise DatasetError(
            problem(
                "the retention rule is empty",
                consequence="Every sample stays",
                remedy="Give at least one of start_version_min, age_s_max and tokens_max",
            )
        )
    gone: list[str] = []

    def build(files: NewFiles) -> Change | None:
        gone.clear()
        dataset = Dataset(writer.folder, writer.state)
        metadata = dataset.metadata(_COLUMNS)
        keep = rule.keep(metadata, datetime.now(UTC))
        keys = np.array(metadata["sample"].to_pylist(), dtype=object)
        change = Change("retain")
        rows: list[tuple[str, int, str]] = []
        at = 0
        for fragment, live in dataset.live_rows():
            numbers = np.arange(fragment.metadata.rows) if live is None else live
            stays, names = keep[at : at + len(numbers)], keys[at : at + len(numbers)]
            at += len(numbers)
            gone.extend(names[~stays])
            if not stays.any():
                change.retired.append(fragment.id)
            else:
                for number, key in zip(numbers[~stays].tolist(), names[~stays], strict=True):
                    rows.append((fragment.id, number, key))
        if not change.retired and not rows:
            return None
        kept = set(keys[keep])
        for group_file in writer.state.group_files:
            index = read_table(writer.folder, group_file.index, INDEX_SCHEMA, ["sample"])
            if kept.isdisjoint(index["sample"].to_pylist()):
                change.group_files_removed.append(group_file.payload.path)
        if rows:
            change.tombstones = [files.tombstones(rows, f"retention: {rule}")]
        return change

    written, _ = writer.commit(build)
    return CommitInfo(writer.version, tuple(gone), (), written)


def vacuum(dataset: Dataset, *, grace_s: float = GRACE_S, dry_run: bool = False) -> dict[str, int]:
    """Delete files that the newest version does not need: what writers that died left behind, and retired payload.

    The newest at this moment: the dataset that is passed may have been opened long ago. Readers of older versions lose
    their payload by this.

    Args:
        grace_s: files younger than this stay: a commit may be on its way to naming them.
        dry_run: delete nothing.

    Returns:
        Size in bytes of each file that was, or would be, deleted, by path relative to the dataset.
    """
    manifest = dataset.folder / MANIFEST_FOLDER
    folders = [dataset.folder / name for name in (METADATA_FOLDER, PAYLOAD_FOLDER, INDEX_FOLDER, TOMBSTONE_FOLDER)]
    found = [path for folder in (*folders, manifest) for path in sorted(folder.rglob("*"))]
    # In this order: a file that was found above and is committed later than this is younger than the grace time.
    needed = {entry.path for entry in Manifest(dataset.folder).load().files()}
    oldest = time.time() - grace_s
    out: dict[str, int] = {}
    for path in found:
        relative = path.relative_to(dataset.folder).as_posix()
        is_manifest = path.parent == manifest and path.suffix == ".json"
        if relative in needed or is_manifest or not path.is_file() or path.stat().st_mtime > oldest:
            continue
        out[relative] = path.stat().st_size
        if not dry_run:
            path.unlink()
    return out
