"""Reading a dataset: metadata as one Arrow table, payload by sample."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DatasetDamaged, DatasetError, problem
from .manifest import FileEntry, Fragment, Manifest, State
from .payload import read_block
from .rows import PayloadRow
from .schema import (
    INDEX_SCHEMA,
    LOCATION_FIELDS,
    METADATA_SCHEMA,
    TOKENS,
    TOMBSTONE_SCHEMA,
    check_schema,
    payload_schema,
)


def open_dataset(folder: str | Path, *, version: int | None = None, check_files: bool = True) -> Dataset:
    """Open the newest version of a dataset, or the given one. What others add later is not seen.

    Args:
        check_files: see that every file is there and of the right size.

    Raises:
        DatasetError: there is no dataset, or not that version.
        DatasetDamaged: the manifest is not sound, or names a file that is missing or has another size.
        DatasetTooNew: written by a newer format.
    """
    path = Path(folder)
    dataset = Dataset(path, Manifest(path).load(version))
    if check_files:
        for entry in dataset.state.files():
            check_file(path / entry.path, entry)
    return dataset


def read_table(folder: Path, entry: FileEntry, schema: Any, columns: list[str] | None = None) -> Any:
    """Columns of one of our metadata, index or tombstone files; only their bytes are read.

    Raises:
        DatasetDamaged: missing, cut short, not Arrow, or not ours; the message names the file.
    """
    path = folder / entry.path
    check_file(path, entry)
    try:
        with pa.memory_map(str(path)) as source:
            included = None if columns is None else sorted(schema.names.index(c) for c in columns)
            options = pa.ipc.IpcReadOptions(included_fields=included) if included is not None else None
            file = pa.ipc.open_file(source, options=options)
            check_schema(file.schema, _project(schema, included), str(path))
            table = file.read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, str(error)) from error
    return table if columns is None else table.select(columns)


def _project(schema: Any, included: list[int] | None) -> Any:
    return schema if included is None else pa.schema([schema.field(i) for i in included], metadata=schema.metadata)


def check_file(path: Path, entry: FileEntry) -> None:
    """Raises DatasetDamaged if the file is missing or has another size than the manifest says."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise damaged(path, "the manifest names it and it is missing") from None
    if size != entry.bytes:
        raise damaged(path, f"it has {size} bytes; the manifest says {entry.bytes}")


def damaged(path: Path, what: str) -> DatasetDamaged:
    return DatasetDamaged(
        problem(
            f"{path} cannot be used: {what}",
            consequence="The samples in it cannot be read",
            remedy="Restore the file from a copy; `rollout-wal dataset verify` lists everything that is wrong",
        )
    )


class Dataset:
    """One version of a dataset.

    Rows are numbered 0..num_samples-1 in the order in which they were committed, tombstoned ones left out. The
    numbering belongs to the version: plans name rows, and name the version with them.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.state = state
        self._live: list[tuple[Fragment, Any]] | None = None
        self._locations: dict[str, Any] = {}
        self._rows_by_key: dict[str, int] | None = None

    @property
    def version(self) -> int:
        return self.state.version

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the column groups, `tokens` first."""
        return tuple(sorted(self.state.groups, key=lambda name: (name != TOKENS, name)))

    @property
    def num_samples(self) -> int:
        return sum(f.metadata.rows if keep is None else len(keep) for f, keep in self.live_rows())

    def metadata(self, columns: list[str] | None = None) -> Any:
        """An Arrow table with one row per sample; only the named columns, if any are named, are read."""
        tables = []
        for fragment, keep in self.live_rows():
            table = read_table(self.folder, fragment.metadata, METADATA_SCHEMA, columns)
            tables.append(table if keep is None else table.take(keep))
        if not tables:
            empty = METADATA_SCHEMA.empty_table()
            return empty if columns is None else empty.select(columns)
        return pa.concat_tables(tables)

    def files(self, group: str | None = None) -> list[Path]:
        """The committed files of a column group, or the metadata files: what other readers of Arrow should be given.

        They hold tombstoned rows too, and files that are not listed are no part of the dataset.
        """
        live = [f for f in self.state.fragments.values() if not f.retired]
        if group is None:
            return [self.folder / f.metadata.path for f in live]
        self._check_group(group)
        if group == TOKENS:
            return [self.folder / f.tokens.path for f in live]
        return [self.folder / g.payload.path for g in self.state.group_files if g.group == group]

    def row_of(self, key: str) -> int:
        """The row of a sample.

        Raises:
            DatasetError: there is no such sample, or it was tombstoned.
        """
        if self._rows_by_key is None:
            self._rows_by_key = {k: i for i, k in enumerate(self.metadata(["sample"])["sample"].to_pylist())}
        if key not in self._rows_by_key:
            raise DatasetError(
                problem(
                    f"{self.folder} has no sample {key!r} in version {self.version}",
                    consequence="Nothing was read",
                    remedy="Look at the `sample` column of `metadata()`",
                )
            )
        return self._rows_by_key[key]

    def keys_with(self, group: str) -> set[str]:
        """The keys of the samples that have a column group other than `tokens`."""
        return set(self._index(group, ["sample"])["sample"].to_pylist())

    def provenance(self, group: str) -> Any:
        """Who made a column group: an Arrow table with `sample`, `source`, `checkpoint`, `tokenizer_digest`,
        `chat_template_digest`, `precision`. A sample that was scored again is there again, the last time last."""
        self._check_group(group)
        columns = ["sample", "source", "checkpoint", "tokenizer_digest", "chat_template_digest", "precision"]
        return self._index(group, columns)

    def places(self, keys: Iterable[str]) -> list[tuple[str, int, str]]:
        """Where live samples are in their metadata files: (fragment id, row in the file, key). Others are left out."""
        wanted = pa.array(list(keys), pa.string())
        out: list[tuple[str, int, str]] = []
        for fragment, keep in self.live_rows():
            column = read_table(self.folder, fragment.metadata, METADATA_SCHEMA, ["sample"])["sample"]
            hits = np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy())
            if keep is not None:
                hits = np.intersect1d(hits, keep)
            out += zip([fragment.id] * len(hits), hits.tolist(), column.take(hits).to_pylist(), strict=True)
        return out

    def payload(self, sample: str | int, group: str = TOKENS) -> PayloadRow | None:
        """The columns of one group of a sample, by its key or its row; None if it has no such group.

        Only the sample's record batch is read.
        """
        row = self.row_of(sample) if isinstance(sample, str) else sample
        locations = self.locations(group)
        file = locations["file"][row]
        if file < 0:
            return None
        path = self.folder / locations["files"][file]
        offset, size = int(locations["offset"][row]), int(locations["bytes"][row])
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        try:
            batch = read_block(pa.py_buffer(raw), self.schema(group))
        except (pa.ArrowInvalid, OSError) as error:
            raise damaged(path, f"record batch at offset {offset}: {error}") from error
        return PayloadRow(batch, int(locations["row"][row]))

    def schema(self, group: str) -> Any:
        """The Arrow schema of a group's payload files."""
        self._check_group(group)
        return payload_schema(group, self.state.groups[group].columns)

    def locations(self, group: str) -> dict[str, Any]:
        """Where each row's payload is: `files` (paths); by row `file` (index; -1: none), `offset`, `bytes`, ...

        All of them numpy arrays [num_samples], named as in the schema without "payload_".
        """
        self._check_group(group)
        if group not in self._locations:
            self._locations[group] = self._read_locations(group)
        return self._locations[group]  # type: ignore[no-any-return]

    def _read_locations(self, group: str) -> dict[str, Any]:
        names = [field.name for field in LOCATION_FIELDS if field.name != "payload_batch"]
        if group == TOKENS:
            table = self.metadata(names)
            rows = np.arange(table.num_rows)
        else:
            table = self._index(group, ["sample", *names])
            # The last one wins: scores that were computed again replace the earlier ones.
            found = pc.index_in(table["sample"], value_set=self.metadata(["sample"])["sample"])
            rows = found.combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
        codes = table["payload_file"].combine_chunks().dictionary_encode()
        count = self.num_samples
        keep = rows >= 0
        out: dict[str, Any] = {"files": codes.dictionary.to_pylist(), "file": np.full(count, -1, dtype=np.int32)}
        out["file"][rows[keep]] = codes.indices.to_numpy()[keep]
        for name in names[1:]:
            source = table[name].to_numpy()
            values = np.zeros(count, dtype=source.dtype)
            values[rows[keep]] = source[keep]
            out[name.removeprefix("payload_")] = values
        return out

    def _index(self, group: str, columns: list[str]) -> Any:
        """Columns of all index files of a group. No row if retention has removed every one of them."""
        entries = [g.index for g in self.state.group_files if g.group == group]
        tables = [read_table(self.folder, e, INDEX_SCHEMA, columns) for e in entries]
        return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table().select(columns)

    def tombstoned_rows(self) -> dict[str, set[int]]:
        """The rows of each fragment's metadata file that no longer count."""
        dead: dict[str, set[int]] = {}
        for entry in self.state.tombstones:
            table = read_table(self.folder, entry, TOMBSTONE_SCHEMA, ["fragment", "row"])
            for fragment_id, row in zip(table["fragment"].to_pylist(), table["row"].to_pylist(), strict=True):
                dead.setdefault(fragment_id, set()).add(row)
        return dead

    def live_rows(self) -> list[tuple[Fragment, Any]]:
        """The fragments that are not retired, each with the rows of it that count (None: all)."""
        if self._live is None:
            dead = self.tombstoned_rows()
            self._live = []
            for fragment in self.state.fragments.values():
                if fragment.retired:
                    continue
                keep = None
                if fragment.id in dead:
                    keep = np.setdiff1d(np.arange(fragment.metadata.rows), list(dead[fragment.id]))
                self._live.append((fragment, keep))
        return self._live

    def _check_group(self, group: str) -> None:
        if group not in self.state.groups:
            raise DatasetError(
                problem(
                    f"{self.folder} has no column group {group!r} in version {self.version}",
                    consequence="Nothing was read",
                    remedy=f"Its groups are {list(self.groups)}",
                )
            )
