"""Sealing: finished rollouts become part of the dataset, each exactly once, whatever dies when.

The order is the whole argument. Payload and index files are written and synced under names that nobody else uses, then
the metadata that points into them, then their folders; only then does the caller's fence get its say, and last comes
the manifest version that makes all of it visible at once. A process that dies before the last step leaves files that
nobody reads (`vacuum` removes them). One that dies after it, before it could say so, finds the rollouts there when it
seals them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .columns import ColumnSpec, spec_of
from .errors import DatasetMismatch, DatasetPoisoned, problem
from .known_keys import KnownKeys
from .manifest import Change, Fragment, GroupFile, GroupSpec, Manifest, State
from .metadata import index_table, metadata_table
from .new_files import INDEX_FOLDER, METADATA_FOLDER, NewFiles, escape
from .payload import write_options
from .reader import Dataset
from .sample import ColumnGroup, Sample, tokens_crc32c
from .schema import TOKENS
from .storage import Storage
from .validate import base_columns, check_group, check_specs

_T = TypeVar("_T")
_WRITER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """What a commit did. By the time the caller holds it, it is durable.

    Args:
        version: of the manifest, in which everything named here is present.
        added: keys that this call added.
        present: keys that were in the dataset already, from an earlier call or another writer.
        bytes: written and synced by this call.
    """

    version: int
    added: tuple[str, ...]
    present: tuple[str, ...]
    bytes: int


class DatasetWriter:
    """Adds to a dataset folder. Any number of writers may share a folder; one writer is for one thread.

    Memory: about 150 bytes for each sample that the dataset holds, to tell what is there already.

    Args:
        folder: the dataset; created if there is none.
        writer_id: names the files that this writer makes: letters, digits, ".", "_" and "-", 64 at most.
        check_fence: called after everything is synced and before the manifest names it; raises if another process has
            taken over. What it raises is passed on, and the commit does not happen.
        compression: of column groups that this writer is the first to write, by group name: "none" or "zstd". Later
            writers follow what the dataset says.
        default_compression: of groups that `compression` does not name.
        storage: the system calls to use; for tests.

    Raises:
        DatasetDamaged, DatasetTooNew: the folder holds a dataset that cannot be extended.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        writer_id: str,
        check_fence: Callable[[], None] | None = None,
        compression: Mapping[str, str] | None = None,
        default_compression: str = "none",
        storage: Storage | None = None,
    ) -> None:
        if not _WRITER_ID.fullmatch(writer_id):
            raise DatasetMismatch(
                problem(
                    f"writer_id {writer_id!r} cannot be part of a file name",
                    consequence="The dataset was not opened",
                    remedy="Use letters, digits, '.', '_' and '-', 64 at most, not starting with '.'",
                )
            )
        self.folder = Path(folder)
        self._id = writer_id
        self._check_fence = check_fence
        self._compression = dict(compression or {})
        self._default_compression = default_compression
        for name in (default_compression, *self._compression.values()):
            write_options(name)
        self._storage = storage or Storage()
        self._manifest = Manifest(self.folder, self._storage)
        self._poison: BaseException | None = None
        self._known = KnownKeys(self.folder)
        if not self._manifest.exists():
            self._guard(lambda: self._manifest.create(writer_id))
        self._state = self._manifest.load()

    @property
    def version(self) -> int:
        """The newest manifest version that this writer knows of."""
        return self._state.version

    def seal(self, samples: Sequence[Sample]) -> CommitInfo:
        """Make the samples part of the dataset; durable when this returns. All of them, or none.

        A sample whose key is there already is left as it is: sealing again after a crash, or by two writers at once,
        adds it once.

        Raises:
            DatasetMismatch: a sample that is not sound, does not fit the dataset, appears twice in the call, or has
                other tokens than the dataset has under the same key. Nothing was written.
            DatasetPoisoned: an I/O error, now or earlier. What was committed is safe; open a new writer.
            Whatever `check_fence` raises.
        """
        samples = list(samples)
        checksums = {s.key: tokens_crc32c(s.token_ids) for s in samples}
        if len(checksums) != len(samples):
            keys = [s.key for s in samples]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise DatasetMismatch(
                problem(
                    f"the keys {twice[:5]} appear more than once in one call",
                    consequence="Nothing was written",
                    remedy="Give every rollout a key of its own",
                )
            )
        new: list[Sample] = []

        def build(files: NewFiles) -> Change | None:
            self._known.learn(self._state)
            new[:] = [s for s in samples if not self._known.has(s.key, checksums[s.key])]
            return self._write(files, new, checksums) if new else None

        written, change = self.commit(build)
        if change is not None:
            self._known.add({s.key: checksums[s.key] for s in new}, [f.metadata.path for f in change.fragments])
        return self._info(checksums, [s.key for s in new], written)

    def add_columns(self, group: str, columns: Mapping[str, ColumnGroup], *, replace: bool = False) -> CommitInfo:
        """Add a column group, or more rows of one, to samples that are in the dataset; the payload is not rewritten.

        A sample that has the group already is left as it is, so that adding again after a crash changes nothing.

        Args:
            group: its name; not "tokens".
            columns: the columns by the sample's key.
            replace: let these take the place of columns that are there.

        Raises:
            DatasetMismatch: no such sample, or columns that do not belong to its tokens or to the dataset.
            DatasetPoisoned, and whatever `check_fence` raises: as for `seal`.
        """
        if group == TOKENS:
            raise DatasetMismatch(
                problem(
                    f"{TOKENS!r} is the group that every sample is sealed with",
                    consequence="Nothing was written",
                    remedy="Choose another name for the column group",
                )
            )
        new: list[str] = []

        def build(files: NewFiles) -> Change | None:
            dataset = Dataset(self.folder, self._state)
            there = set() if replace or group not in self._state.groups else dataset.keys_with(group)
            new[:] = [key for key in columns if key not in there]
            if not new:
                return None
            table = dataset.metadata(["tokens_crc32c", "prompt_length", "response_length"])
            rows = [dataset.row_of(key) for key in new]
            picked = table.take(rows).to_pylist()
            checksums = {key: row["tokens_crc32c"] for key, row in zip(new, picked, strict=True)}
            for key, row in zip(new, picked, strict=True):
                length = row["prompt_length"] + row["response_length"]
                check_group(key, group, columns[key], length, checksums[key], self._state.tokenizer_digest)
            change = Change("add_columns")
            members = [(key, columns[key]) for key in new]
            change.group_files = [self._write_group(files, change, group, files.new_id(), members, checksums)]
            return change

        written, _ = self.commit(build)
        return self._info(columns, new, written)

    def tombstone(self, keys: Iterable[str], reason: str) -> CommitInfo:
        """Take samples out of the dataset, for good: a tombstoned rollout is not sealed again.

        Their payload stays on disk until the whole fragment is retired; see `retain`.

        Raises:
            DatasetMismatch: a key that was never in the dataset.
            DatasetPoisoned, and whatever `check_fence` raises: as for `seal`.
        """
        wanted = list(dict.fromkeys(keys))
        new: list[str] = []

        def build(files: NewFiles) -> Change | None:
            self._known.learn(self._state)
            if unknown := [key for key in wanted if key not in self._known]:
                raise DatasetMismatch(
                    problem(
                        f"the dataset has never had the samples {unknown[:5]}",
                        consequence="No sample was tombstoned",
                        remedy="Look at the `sample` column of the metadata",
                    )
                )
            rows = Dataset(self.folder, self._state).places(wanted)
            new[:] = [key for _, _, key in rows]
            return Change("tombstone", tombstones=[files.tombstones(rows, reason)]) if rows else None

        written, _ = self.commit(build)
        return self._info(dict.fromkeys(wanted), new, written)

    def commit(self, build: Callable[[NewFiles], Change | None]) -> tuple[int, Change | None]:
        """Make a change that depends on the state of the dataset, however many other writers make theirs.

        For operations over whole datasets (merging, retention). `build` is called again with the newer `state` when
        another writer was faster; what it had written is dropped. None: there is nothing to change.

        Returns:
            Bytes written, and the change that was made.
        """
        return self._guard(lambda: self._commit(build))

    @property
    def state(self) -> State:
        """The dataset as this writer knows it; `build` functions look at it."""
        return self._state

    def known_keys(self) -> Mapping[str, int | None]:
        """Every key that the dataset has or had, with the checksum of its tokens where that is known."""
        self._known.learn(self._state)
        return self._known.checksums

    def _info(self, asked: Iterable[str], added: Sequence[str], written: int) -> CommitInfo:
        others = set(added)
        return CommitInfo(self._state.version, tuple(added), tuple(k for k in asked if k not in others), written)

    def _commit(self, build: Callable[[NewFiles], Change | None]) -> tuple[int, Change | None]:
        written = 0
        while True:
            self._manifest.advance(self._state)
            files = NewFiles(self.folder, self._storage, self._id)
            try:
                change = build(files)
                if change is None:
                    # Whoever committed what is there may have died before its directory sync; it counts only after one.
                    self._manifest.sync()
                    return written, None
                files.sync_folders()
                if self._check_fence is not None:
                    self._check_fence()
            except BaseException:
                files.discard()
                raise
            written += files.bytes
            # An error in here may come after the version appeared under its name: the files must stay.
            if self._manifest.commit(self._state, change, self._id):
                return written, change
            # A lost race: the commit that won may hold some of these keys, or another type for a column. What was
            # written is dropped and written anew, so that each row is stored once.
            files.discard()

    def _write(self, files: NewFiles, samples: list[Sample], checksums: Mapping[str, int]) -> Change:
        """Write the files of new samples; the change that adds them."""
        change = Change("seal")
        tokenizer = self._state.tokenizer_digest
        if tokenizer is None:
            tokenizer = change.tokenizer_digest = samples[0].tokenizer_digest
        for sample in samples:
            if sample.tokenizer_digest != tokenizer:
                raise DatasetMismatch(
                    problem(
                        f"sample {sample.key!r} was made with tokenizer {sample.tokenizer_digest!r}; "
                        f"the dataset's is {tokenizer!r}",
                        consequence="Its token ids would mean other text, so nothing was written",
                        remedy="Seal it into a dataset of its own",
                    )
                )
        rows = [(s.key, base_columns(s)) for s in samples]
        group_rows: dict[str, list[tuple[str, ColumnGroup]]] = {}
        for sample in samples:
            for name, group in sample.groups.items():
                check_group(sample.key, name, group, sample.length, checksums[sample.key], tokenizer)
                group_rows.setdefault(name, []).append((sample.key, group))

        spec = self._state.groups[TOKENS]
        if not self._state.fragments and TOKENS in self._compression:
            spec = change.groups[TOKENS] = GroupSpec(spec.columns, self._compression[TOKENS])
        fragment = files.new_id()
        tokens, locations = files.payload(TOKENS, fragment, spec, rows)
        change.group_files = [
            self._write_group(files, change, name, fragment, members, checksums) for name, members in group_rows.items()
        ]
        table = metadata_table(
            samples,
            loss_tokens=[int(columns["loss_mask"].sum()) for _, columns in rows],  # type: ignore[union-attr]
            checksums=[checksums[s.key] for s in samples],
            file=tokens.path,
            locations=locations,
        )
        change.fragments = [Fragment(fragment, files.table(METADATA_FOLDER, fragment, table), tokens)]
        return change

    def _write_group(
        self,
        files: NewFiles,
        change: Change,
        name: str,
        file_id: str,
        members: Sequence[tuple[str, ColumnGroup]],
        checksums: Mapping[str, int],
    ) -> GroupFile:
        spec = self._state.groups.get(name)
        if spec is None:
            spec = GroupSpec(_union_of_specs(name, members), self._compression.get(name, self._default_compression))
            change.groups[name] = spec
        known = {c.name: c for c in spec.columns}
        for key, group in members:
            for column_name, column in group.columns.items():
                found = spec_of(column_name, column, bfloat16=column_name in group.bfloat16)
                check_specs(key, name, known, found)
        rows = [(key, group.columns) for key, group in members]
        payload, locations = files.payload(name, file_id, spec, rows)
        keys = [key for key, _ in members]
        index = index_table(
            keys, [group for _, group in members], [checksums[key] for key in keys], payload.path, locations
        )
        return GroupFile(name, payload, files.table(f"{INDEX_FOLDER}/{escape(name)}", file_id, index))

    def _guard(self, work: Callable[[], _T]) -> _T:
        """Run `work`; after an I/O error refuse everything from then on."""
        if self._poison is not None:
            raise self._poisoned() from self._poison
        try:
            return work()
        except OSError as error:
            self._poison = error
            raise self._poisoned() from error

    def _poisoned(self) -> DatasetPoisoned:
        return DatasetPoisoned(
            problem(
                f"writer {self._id!r} of {self.folder} met an I/O error: {self._poison}",
                consequence="What was committed is safe; whether the call that failed was committed is not known here, "
                "and this writer accepts nothing more",
                remedy="Remedy the cause (`df`, `dmesg`), open a new writer and seal the same samples again: those "
                "that are there are left alone",
            )
        )


def _union_of_specs(group: str, members: Sequence[tuple[str, ColumnGroup]]) -> tuple[ColumnSpec, ...]:
    """The columns of a new group: all that any of its first samples has.

    Raises:
        DatasetMismatch: two samples disagree on the type of a column.
    """
    specs: dict[str, ColumnSpec] = {}
    for key, member in members:
        for name, column in member.columns.items():
            found = spec_of(name, column, bfloat16=name in member.bfloat16)
            specs.setdefault(name, found)
            check_specs(key, group, specs, found)
    return tuple(specs[name] for name in sorted(specs))
