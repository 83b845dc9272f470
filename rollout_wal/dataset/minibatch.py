"""What a rank gets of a step: samples whose arrays are views of the node's shared pages."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import LoaderError, problem
from .payload import read_block
from .rows import PayloadRow
from .schema import TOKENS


class LoadedSample:
    """One sample of a step: where the plan put it, and its columns by group."""

    __slots__ = ("_batch", "_index", "bin", "length", "row", "start")

    def __init__(self, batch: MiniBatch, index: int) -> None:
        self._batch = batch
        self._index = index
        self.row = int(batch.rows[index])
        self.bin = int(batch.bins[index])
        self.start = int(batch.starts[index])
        self.length = int(batch.lengths[index])

    @property
    def tokens(self) -> PayloadRow:
        """The columns that every sample has."""
        found = self.group(TOKENS)
        if found is None:
            raise LoaderError(
                problem(
                    f"the column group {TOKENS!r} was not loaded",
                    consequence="There are no tokens to show",
                    remedy=f"Name {TOKENS!r} among the loader's groups",
                )
            )
        return found

    def group(self, name: str) -> PayloadRow | None:
        """The columns of a group, zero-copy; None if the sample has none of it or it was not loaded."""
        return self._batch.payload(self._index, name)


class MiniBatch:
    """What one rank trains on in one step. `rows`, `bins`, `starts`, `lengths` are parallel to `samples`.

    `nbytes` is what the step takes in shared memory, for all ranks of the node together.
    """

    def __init__(
        self, step: int, memory_B: NDArray[np.uint8], directory_offset: int, data_rank: int, schemas: dict[str, Any]
    ) -> None:
        self.step = step
        self.nbytes = len(memory_B)
        self._memory_B: NDArray[np.uint8] | None = memory_B
        self._schemas = schemas
        self._blocks: dict[tuple[str, int], Any] = {}
        directory = msgpack.unpackb(memory_B[directory_offset:].tobytes())
        mine = np.flatnonzero(np.frombuffer(directory["rank"], dtype=np.int32) == data_rank)
        self.rows = np.frombuffer(directory["row"], dtype=np.int64)[mine]
        self.bins, self.starts, self.lengths = (
            np.frombuffer(directory[name], dtype=np.int32)[mine] for name in ("bin", "start", "length")
        )
        self._places = {
            name: (
                np.frombuffer(entry["offset"], dtype=np.int64)[mine],
                np.frombuffer(entry["bytes"], dtype=np.int64)[mine],
                np.frombuffer(entry["row"], dtype=np.int32)[mine],
            )
            for name, entry in directory["groups"].items()
        }

    @property
    def samples(self) -> list[LoadedSample]:
        """This rank's samples, packed row by packed row."""
        return [LoadedSample(self, index) for index in range(len(self.rows))]

    def release(self) -> None:
        """Let go of the step, but for arrays of it that are still in use."""
        self._memory_B = None
        self._blocks.clear()

    def payload(self, index: int, group: str) -> PayloadRow | None:
        """The columns of one group of the sample at `index`, zero-copy; None if there are none.

        Raises:
            LoaderError: the step was released.
        """
        if self._memory_B is None:
            raise LoaderError(
                problem(
                    f"step {self.step} was released",
                    consequence="Its memory may hold another step by now",
                    remedy="Take the arrays that are needed longer before the next step is asked for",
                )
            )
        if group not in self._places:
            return None
        offsets, sizes, rows = self._places[group]
        at = int(offsets[index])
        if at < 0:
            return None
        block = self._blocks.get((group, at))
        if block is None:
            message = pa.py_buffer(self._memory_B[at : at + int(sizes[index])])
            block = self._blocks[group, at] = read_block(message, self._schemas[group])
        return PayloadRow(block, int(rows[index]), self._memory_B)
