"""A plan: an Arrow table with one row per sample and place, and what can be asked of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import DatasetDamaged, DatasetError, problem
from .schema import FORMAT, FORMAT_KEY, KIND_KEY, check_schema
from .storage import Storage

if TYPE_CHECKING:
    from .planner import PlanReport

_PLAN_KEY = b"rollout_wal.plan"

#: start: where the sample begins in its packed row, in tokens. row: of the dataset version that the plan names.
PLAN_SCHEMA: Any = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("bin", pa.int32(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("teachers", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ],
    metadata={FORMAT_KEY: str(FORMAT).encode(), KIND_KEY: b"plan"},
)


class Plan:
    """One epoch: `table`, ordered by step, rank, bin and start.

    Args:
        table: of `PLAN_SCHEMA`.
        identity: dataset id, its version, and the spec in plain types.
        report: what planning left out; None for a plan that was read from a file.
    """

    def __init__(self, table: Any, identity: dict[str, Any], report: PlanReport | None = None) -> None:
        self.table = table.combine_chunks()
        self.identity = identity
        self.report = report
        self._step = self.column("step")
        self.steps = int(self._step[-1]) + 1 if len(self._step) else 0

    def column(self, name: str) -> NDArray[Any]:
        """A numeric column of the table, without a copy: int32 [rows], `row` int64."""
        column = self.table[name]
        return np.asarray(column.chunk(0).to_numpy()) if column.num_chunks else np.zeros(0, dtype=np.int32)

    @property
    def ranks(self) -> int:
        return int(self.identity["spec"]["ranks"])

    @property
    def version(self) -> int:
        """The dataset version that the row numbers belong to."""
        return int(self.identity["version"])

    def step(self, step: int, rank: int | None = None) -> Any:
        """The rows of one step, of one rank or of all.

        Raises:
            DatasetError: no such step.
        """
        if not 0 <= step < self.steps:
            raise DatasetError(
                problem(
                    f"the plan has no step {step}; it has {self.steps}",
                    consequence="Nothing was read",
                    remedy="Count steps from 0, and plan the next epoch when this one is through",
                )
            )
        # Of the column's own dtype: a search for wider integers would copy all of it.
        start, stop = np.searchsorted(self._step, np.array([step, step + 1], dtype=np.int32))
        rows = self.table.slice(start, stop - start)
        return rows if rank is None else rows.filter(pa.compute.field("rank") == rank)

    def heads(self, step: int, rank: int) -> Iterator[tuple[str, list[int]]]:
        """In which order to evaluate teachers: each teacher of the step once, with the bins that need it.

        Bins are in their own order within a teacher; one that needs several teachers appears under each.
        """
        needs: dict[str, list[int]] = {}
        rows = self.step(step, rank)
        for teachers, bin_number in zip(rows["teachers"].to_pylist(), rows["bin"].to_pylist(), strict=True):
            for teacher in teachers.split("+") if teachers else ():
                bins = needs.setdefault(teacher, [])
                if bin_number not in bins:
                    bins.append(bin_number)
        yield from sorted(needs.items())

    def reshard(self, ranks: int, bins_per_rank: int) -> Plan:
        """The same steps with the same samples for another number of ranks.

        For a job that resumes at its step counter on another number of machines: each step's packed rows are dealt
        out anew, whole.

        Raises:
            DatasetError: ranks × bins_per_rank is not what the plan's steps hold.
        """
        spec = self.identity["spec"]
        per_step = spec["ranks"] * spec["bins_per_rank"]
        if ranks < 1 or ranks * bins_per_rank != per_step:
            raise DatasetError(
                problem(
                    f"{ranks} ranks with {bins_per_rank} rows each do not take the {per_step} rows of a step",
                    consequence="The plan was not changed",
                    remedy=f"Choose a number of ranks that divides {per_step}",
                )
            )
        place = self.column("rank") * spec["bins_per_rank"] + self.column("bin")
        rank, bin_number = place // bins_per_rank, place % bins_per_rank
        table = self.table
        for name, values in (("rank", rank), ("bin", bin_number)):
            table = table.set_column(
                table.schema.names.index(name), PLAN_SCHEMA.field(name), pa.array(values, pa.int32())
            )
        return Plan(table, {**self.identity, "spec": {**spec, "ranks": ranks, "bins_per_rank": bins_per_rank}})

    def write(self, path: str | Path) -> None:
        """Write the plan as an Arrow IPC file that appears whole or not at all."""
        storage, target = Storage(), Path(path)
        schema = PLAN_SCHEMA.with_metadata({**PLAN_SCHEMA.metadata, _PLAN_KEY: json.dumps(self.identity).encode()})
        with storage.new_file(target) as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(self.table.cast(schema))
        storage.fsync_directory(target.parent)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """A plan that `write` wrote, mapped rather than read.

        Raises:
            DatasetDamaged: missing, cut short, or no plan.
            DatasetTooNew: of a newer format.
        """
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            check_schema(table.schema, PLAN_SCHEMA, str(path))
            identity = json.loads(table.schema.metadata[_PLAN_KEY])
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise DatasetDamaged(
                problem(
                    f"{path} is not a plan: {error}",
                    consequence="Nothing was loaded",
                    remedy="Plan again: the same spec and dataset version give the same plan",
                )
            ) from error
        return cls(table, identity)
