"""What the learner gets: a batch as it was submitted, read from the dataset, with its scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_wal.dataset import Dataset, PayloadRow, open_dataset
from rollout_wal.dataset.schema import TOKENS


class BatchSample:
    """One rollout with its columns: what `rollout_wal.dataset.collate` takes.

    Attributes:
        key: of the sample.
        metadata: its row of the dataset's metadata, by column.
        length: tokens, the prompt's included.
    """

    __slots__ = ("_dataset", "_rows", "key", "length", "metadata")

    def __init__(self, dataset: Dataset, key: str, metadata: dict[str, Any]) -> None:
        self._dataset, self._rows = dataset, dict[str, PayloadRow | None]()
        self.key, self.metadata = key, metadata
        self.length = int(metadata["prompt_length"]) + int(metadata["response_length"])

    def group(self, name: str) -> PayloadRow | None:
        """The columns of a group, such as "tokens" or "teacher.math"; None if the sample has none of it."""
        if name not in self._rows:
            there = name in self._dataset.groups
            self._rows[name] = self._dataset.payload(self.key, name) if there else None
        return self._rows[name]

    @property
    def tokens(self) -> PayloadRow:
        found = self.group(TOKENS)
        assert found is not None
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ScoredBatch:
    """A batch of prompts with all its rollouts that may be trained on.

    Args:
        number: of the batch, from 0.
        use: how often the learner has had it, this time included.
        samples: by key.
        submitted: rollouts that were begun for it.
        left_out: how many of them are not among the samples, by reason: "stale", "censored", "unscorable".
    """

    number: int
    use: int
    samples: tuple[BatchSample, ...]
    submitted: int
    left_out: dict[str, int]

    @property
    def teachers(self) -> list[str]:
        """All teachers that scored any of them."""
        return sorted({teacher for sample in self.samples for teacher in sample.metadata["teachers"]})


def read_batch(folder: Path, number: int, use: int, keys: list[str], submitted: int, left_out: Any) -> ScoredBatch:
    """Raises DatasetError: it cannot be read."""
    dataset = open_dataset(folder, check_files=False)
    table = dataset.metadata()
    rows = table.take([dataset.row_of(key) for key in keys]).to_pylist()
    samples = tuple(BatchSample(dataset, key, row) for key, row in zip(keys, rows, strict=True))
    return ScoredBatch(number, use, samples, submitted, dict(left_out))
