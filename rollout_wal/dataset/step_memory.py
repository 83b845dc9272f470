"""The steps of a plan that are in a node's shared memory now, and which ranks hold them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arena import Arena
from .errors import LoaderError, problem
from .helpers import Helpers
from .layout import StepLayout, StepLayouts
from .plan import Plan
from .reader import open_dataset
from .reader_config import ReaderConfig

#: Processes that read and decompress, at most, where the caller does not say.
_PROCESSES_MAX = 4


@dataclass(slots=True)
class _Loaded:
    """A step in memory."""

    offset: int
    layout: StepLayout
    holders: set[Hashable]


class StepMemory:
    """Loads steps into extents of one arena, and frees them when nobody holds or needs them.

    Raises:
        DatasetError: the plan or the dataset cannot be used, or they do not belong together.
    """

    def __init__(self, config: ReaderConfig) -> None:
        self._arena = Arena(config.memory_bytes_max)
        processes = config.processes or min(_PROCESSES_MAX, len(os.sched_getaffinity(0)))
        # Before anything else: Arrow starts threads when it reads, and a fork takes none of them along.
        self._helpers = Helpers(processes - 1, Path(config.dataset), self._arena.memory_B)
        plan = Plan.read(config.plan)
        dataset = open_dataset(config.dataset, version=plan.version)
        if dataset.state.dataset != plan.identity["dataset"]:
            raise LoaderError(
                problem(
                    f"the plan {config.plan} is for dataset {plan.identity['dataset']!r}; {config.dataset} is "
                    f"{dataset.state.dataset!r}",
                    consequence="Its row numbers would name other samples, so nothing was loaded",
                    remedy="Plan again over this dataset",
                )
            )
        self.steps = plan.steps
        self.schemas = {name: bytes(dataset.schema(name).serialize()) for name in config.groups}
        # Steps are looked up in the mapped plan without Arrow: for a step of a few megabytes its calls would show.
        self._columns = {name: plan.column(name) for name in ("step", "rank", "bin", "start", "length", "row")}
        self._first = np.searchsorted(self._columns["step"], np.arange(self.steps + 1, dtype=np.int32))
        self._data_ranks = None if set(config.data_ranks) >= set(range(plan.ranks)) else np.array(config.data_ranks)
        self._layouts = StepLayouts(dataset, config.groups, need_all=config.need_all)
        self._loaded: dict[int, _Loaded] = {}
        self._waiting: tuple[int, StepLayout] | None = None
        self._pages_to_give_back = False

    @property
    def fd_for_ranks(self) -> int:
        return self._arena.fd_for_ranks

    def __contains__(self, step: int) -> bool:
        return step in self._loaded

    def load(self, step: int) -> bool:
        """Read a step; False if there is no room until ranks let go of something.

        Raises:
            LoaderError: the step does not fit into all of the memory.
            DatasetError: it cannot be read.
        """
        if self._waiting is None or self._waiting[0] != step:
            self._waiting = step, self._layout(step)
        layout = self._waiting[1]
        if Arena.rounded(layout.size) > self._arena.bytes_max:
            raise LoaderError(
                problem(
                    f"step {step} takes {layout.size} bytes of shared memory; the loader may use "
                    f"{self._arena.bytes_max}",
                    consequence="It was not loaded",
                    remedy="Raise memory_bytes_max, plan smaller steps, or load fewer column groups",
                )
            )
        offset = self._arena.allocate(layout.size)
        if offset is None:
            return False
        self._helpers.fill(layout.groups, offset, layout.size)
        start = offset + layout.directory_offset
        self._arena.memory_B[start : offset + layout.size] = np.frombuffer(layout.directory, dtype=np.uint8)
        self._loaded[step] = _Loaded(offset, layout, set())
        self._waiting = None
        self._pages_to_give_back = True
        return True

    def _layout(self, step: int) -> StepLayout:
        here = slice(self._first[step], self._first[step + 1])
        rows = {name: values[here] for name, values in self._columns.items()}
        if self._data_ranks is not None:
            mine = np.isin(rows["rank"], self._data_ranks)
            rows = {name: values[mine] for name, values in rows.items()}
        return self._layouts.of(rows)

    def hold(self, step: int, rank: Hashable) -> dict[str, Any]:
        """Count a rank among the step's holders; where the step lies, for the rank."""
        loaded = self._loaded[step]
        loaded.holders.add(rank)
        layout = loaded.layout
        return {"offset": loaded.offset, "bytes": layout.size, "directory_offset": layout.directory_offset}

    def let_go(self, rank: Hashable, step: int | None = None) -> None:
        """The rank does not hold the step any more; None: any step."""
        for number in list(self._loaded) if step is None else [step]:
            if number in self._loaded:
                self._loaded[number].holders.discard(rank)

    def free(self, needed: Callable[[int], bool]) -> None:
        """Free what nobody holds, but for steps that are still needed."""
        for step, loaded in list(self._loaded.items()):
            if not loaded.holders and not needed(step):
                self._arena.deallocate(loaded.offset, loaded.layout.size)
                del self._loaded[step]

    def give_back(self) -> None:
        """Nothing to do: return the memory to the kernel if nothing is loaded. Used pages cost a tenth of fresh ones,
        so this is not for the time between two steps."""
        if self._pages_to_give_back and not self._loaded:
            self._arena.give_back()
            self._pages_to_give_back = False
