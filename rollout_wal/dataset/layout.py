"""Where a step's payload will lie in one stretch of memory: Arrow messages, uncompressed, side by side.

And behind them, what a rank reads: for each sample and column group, where its record batch lies and which row of it is
the sample's. Nothing is interpreted on the way, so the cost is that of the bytes; `blocks` moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from .blocks import Blocks
from .errors import DatasetError, problem
from .inflate import HEAD_SLACK_BYTES
from .reader import Dataset

_ALIGN = 64
#: Of a payload file: a terabyte. What is left of 63 bits numbers the files.
_OFFSET_BITS = 40


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where everything of a step will lie, known before a byte of payload is read.

    Args:
        size: bytes that the extent must have.
        directory: msgpack, at `directory_offset` in the extent: for each sample its row, data rank, bin, start and
            length, and for each group by sample the block's offset and size (-1: none) and the row in it.
    """

    groups: tuple[Blocks, ...]
    size: int
    directory_offset: int
    directory: bytes


class StepLayouts:
    """Lays out steps of a plan: which blocks of which files go where.

    Args:
        dataset: at the plan's version.
        groups: column groups to load.
        need_all: a sample without one of the groups is an error, not an absence.
    """

    def __init__(self, dataset: Dataset, groups: Sequence[str], *, need_all: bool = True) -> None:
        self._dataset = dataset
        self._groups = tuple(groups)
        self._need_all = need_all
        for group in groups:
            dataset.locations(group)

    def of(self, rows: Mapping[str, NDArray[Any]]) -> StepLayout:
        """Lay out the samples of plan rows.

        Args:
            rows: the plan's columns row, rank, bin, start and length.

        Raises:
            DatasetError: a sample lacks a group that is needed.
        """
        row = rows["row"]
        directory: dict[str, Any] = {name: rows[name].tobytes() for name in ("row", "rank", "bin", "start", "length")}
        entries = directory["groups"] = {}
        groups = []
        at = 0
        for name in self._groups:
            group, entries[name], at = self._lay_out_group(name, row, at)
            groups.append(group)
        packed = msgpack.packb(directory)
        return StepLayout(tuple(groups), at + len(packed), at, packed)

    def _lay_out_group(self, name: str, row: NDArray[np.int64], at: int) -> tuple[Blocks, dict[str, bytes], int]:
        """The blocks of one group, the directory's entry, and where the next group may begin."""
        places = self._dataset.locations(name)
        file, offset = places["file"][row].astype(np.int64), places["offset"][row]
        present: Any = slice(None)
        if file.min(initial=0) < 0:
            if self._need_all:
                raise self._lacking(name, row, file < 0)
            present = np.flatnonzero(file >= 0)
        # Small samples share a block; it is loaded once.
        place = (file[present] << _OFFSET_BITS) | offset[present]
        unique, first_of, block = np.unique(place, return_index=True, return_inverse=True)
        chosen = row[present][first_of]
        raw, stored = places["raw_bytes"][chosen], places["bytes"][chosen]
        needed = np.where(stored == raw, raw, raw + HEAD_SLACK_BYTES)
        ends = np.cumsum(-(-needed // _ALIGN) * _ALIGN)
        at = -(-at // _ALIGN) * _ALIGN
        target = np.empty_like(ends)
        target[:1] = at
        target[1:] = at + ends[:-1]
        where = np.full(len(row), -1, dtype=np.int64)
        size = np.zeros(len(row), dtype=np.int64)
        row_in_block = np.zeros(len(row), dtype=np.int32)
        where[present] = target[block]
        size[present] = needed[block]
        row_in_block[present] = places["row"][row[present]]
        entry = {"offset": where.tobytes(), "bytes": size.tobytes(), "row": row_in_block.tobytes()}
        blocks = Blocks(
            places["files"], unique >> _OFFSET_BITS, unique & ((1 << _OFFSET_BITS) - 1), stored, raw, target
        )
        return blocks, entry, at + (int(ends[-1]) if len(ends) else 0)

    def _lacking(self, name: str, row: NDArray[np.int64], absent: NDArray[np.bool_]) -> DatasetError:
        first = int(row[np.argmax(absent)])
        key = self._dataset.metadata(["sample"])["sample"][first].as_py()
        return DatasetError(
            problem(
                f"sample {key!r} has no column group {name!r}, and {int(absent.sum()) - 1} more of its step",
                consequence="The step was not loaded",
                remedy="Add the columns, or load with need_all=False",
            )
        )
