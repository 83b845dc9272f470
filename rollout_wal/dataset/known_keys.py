"""The keys that a dataset has or had: what makes sealing again add nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import DatasetMismatch, problem
from .manifest import State
from .reader import read_table
from .schema import METADATA_SCHEMA, TOMBSTONE_SCHEMA


class KnownKeys:
    """Keys with the checksum of their tokens, where that is known: about 150 bytes each, read as commits appear."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checksums: dict[str, int | None] = {}
        self._files: set[str] = set()

    @property
    def checksums(self) -> Mapping[str, int | None]:
        return self._checksums

    def __contains__(self, key: object) -> bool:
        return key in self._checksums

    def learn(self, state: State) -> None:
        """Read the keys of fragments and tombstones that were committed since the last look."""
        for entry in state.tombstones:
            if entry.path not in self._files:
                table = read_table(self._folder, entry, TOMBSTONE_SCHEMA, ["sample"])
                for key in table["sample"].to_pylist():
                    self._checksums.setdefault(key, None)
                self._files.add(entry.path)
        for fragment in state.fragments.values():
            if fragment.metadata.path not in self._files:
                table = read_table(self._folder, fragment.metadata, METADATA_SCHEMA, ["sample", "tokens_crc32c"])
                self._checksums.update(
                    zip(table["sample"].to_pylist(), table["tokens_crc32c"].to_pylist(), strict=True)
                )
                self._files.add(fragment.metadata.path)

    def add(self, checksums: Mapping[str, int], files: Iterable[str]) -> None:
        """What this writer committed itself need not be read."""
        self._checksums.update(checksums)
        self._files.update(files)

    def has(self, key: str, checksum: int) -> bool:
        """Whether the dataset has or had the sample.

        Raises:
            DatasetMismatch: with other tokens.
        """
        if key not in self._checksums:
            return False
        there = self._checksums[key]
        if there is not None and there != checksum:
            raise DatasetMismatch(
                problem(
                    f"sample {key!r} is in the dataset with tokens of checksum {there:#010x}; the one to be sealed has "
                    f"{checksum:#010x}",
                    consequence="A rollout has one outcome, so nothing was written",
                    remedy="Find out which of the two was delivered; keys must be unique to a rollout",
                )
            )
        return True
