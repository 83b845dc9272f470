"""What the node's reader is made of: helpers that fill parts of a step, prefetch depth, and a rank that forks."""

from __future__ import annotations

import os
import signal
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard

from rollout_wal.dataset import Dataset, DatasetWriter, PlanSpec, Sample, helpers, open_dataset, plan
from rollout_wal.dataset.arena import Arena
from rollout_wal.dataset.blocks import Blocks
from rollout_wal.dataset.errors import DatasetDamaged, LoaderError
from rollout_wal.dataset.helpers import Helpers
from rollout_wal.dataset.layout import StepLayout, StepLayouts
from rollout_wal.dataset.loader import Loader
from rollout_wal.dataset.prefetch import CALM_TAKES, PrefetchDepth
from rollout_wal.dataset.wire import connect, listen

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SIZE = 1 << 24


@pytest.fixture
def dataset(tmp_path: Path, make_sample: Callable[..., Sample]) -> Dataset:
    """Small and large samples; the teacher's columns compressed."""
    samples = [make_sample(i, response=30 + 90 * i, teacher="math") for i in range(40)]
    writer = DatasetWriter(tmp_path / "data", writer_id="w", compression={"teacher.math": "zstd"})
    for start in range(0, 40, 10):
        writer.seal(samples[start : start + 10])
    return open_dataset(tmp_path / "data")


def layout_of(dataset: Dataset) -> StepLayout:
    row = np.random.default_rng(0).permutation(40).astype(np.int64)
    zeros = np.zeros(40, dtype=np.int32)
    rows = {"row": row, "rank": zeros, "bin": zeros, "start": zeros, "length": zeros}
    return StepLayouts(dataset, ("tokens", "teacher.math")).of(rows)


@pytest.fixture
def hired(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], tuple[Helpers, Arena]]]:
    """Helpers that are asked for anything, however little; afterwards none of them is left."""
    monkeypatch.setattr(helpers, "_PART_COST_MIN", 1)
    made: list[Helpers] = []

    def hire(count: int) -> tuple[Helpers, Arena]:
        arena = Arena(SIZE)
        made.append(Helpers(count, dataset.folder, arena.memory_B))
        return made[-1], arena

    yield hire
    for each in made:
        pids = list(each.pids)
        each.close()
        for pid in pids:  # by pid: other tests of this process may have children of their own
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def test_helpers_put_everything_where_one_process_puts_it(dataset: Dataset, hired: Any) -> None:
    layout = layout_of(dataset)
    assert 20 < len(layout.groups[1].file) < 40, "small samples share blocks"
    alone, expected = hired(0)
    alone.fill(layout.groups, 4096, layout.size)
    assert expected.memory_B.any()
    for count in (1, 3):
        together, found = hired(count)
        for _ in range(3):
            found.memory_B[:] = 0
            together.fill(layout.groups, 4096, layout.size)
            np.testing.assert_array_equal(found.memory_B, expected.memory_B)


def test_parts_are_all_of_it_once_and_cost_about_the_same(dataset: Dataset) -> None:
    for blocks in layout_of(dataset).groups:
        for parts in (1, 2, 5, 200):
            split = blocks.split(parts)
            assert len(split) == parts
            np.testing.assert_array_equal(np.concatenate([b.target for b in split]), blocks.target)
            largest = int(blocks.cost_N.max())
            assert all(abs(int(b.cost_N.sum()) - int(blocks.cost_N.sum()) / parts) <= largest for b in split)
        again = Blocks.unpack(split[7].pack())
        np.testing.assert_array_equal(again.source, split[7].source)
        assert [again.paths[f] for f in again.file] == [blocks.paths[f] for f in split[7].file]
    empty = Blocks([], *[np.zeros(0, dtype=np.int64)] * 5)
    assert [len(b.file) for b in empty.split(3)] == [0, 0, 0]


def test_damage_that_a_helper_meets_is_named(dataset: Dataset, hired: Any) -> None:
    layout = layout_of(dataset)
    paths = dataset.files("teacher.math")
    for path in paths:
        os.truncate(path, 4000)
    together, _ = hired(3)
    for _ in range(2):  # it is ready for more afterwards
        with pytest.raises(DatasetDamaged, match="it ends before byte"):
            together.fill(layout.groups, 0, layout.size)


def test_a_frame_that_lies_about_its_size_costs_no_memory(dataset: Dataset, hired: Any) -> None:
    layout = layout_of(dataset)
    blocks = layout.groups[1]
    path = dataset.folder / blocks.paths[int(blocks.file[-1])]
    raw = bytearray(path.read_bytes())
    frame = raw.index(zstandard.FRAME_HEADER, int(blocks.source[-1]))
    # "One segment, its size in eight bytes": a terabyte.
    raw[frame : frame + 13] = zstandard.FRAME_HEADER + b"\xe0" + struct.pack("<q", 1 << 40)
    path.write_bytes(raw)
    alone, _ = hired(0)
    with pytest.raises(DatasetDamaged, match=rf"{path.name} cannot be used: record batch at .*"):
        alone.fill(layout.groups, 0, layout.size)


def test_a_helper_that_is_killed_is_an_error_and_not_a_hang(dataset: Dataset, hired: Any) -> None:
    layout = layout_of(dataset)
    together, _ = hired(2)
    together.fill(layout.groups, 0, layout.size)
    os.kill(together.pids[1], signal.SIGKILL)
    with pytest.raises(LoaderError, match=r"a helper process .* died"):
        together.fill(layout.groups, 0, layout.size)


def test_depth_follows_what_the_ranks_need() -> None:
    depth = PrefetchDepth(5)
    assert depth.value == 2
    for _ in range(10):
        depth.taken(waited_s=0.5)
    assert depth.value == 5, "waits deepen it, up to the maximum"
    for _ in range(CALM_TAKES - 1):
        depth.taken(waited_s=0.0)
    assert depth.value == 5
    depth.taken(waited_s=0.0)
    assert depth.value == 4, "a long calm makes it shallower, by one"
    for _ in range(CALM_TAKES - 1):
        depth.taken(waited_s=0.0)
    depth.taken(waited_s=0.5)
    assert depth.value == 5, "a wait ends the calm"
    for _ in range(10 * CALM_TAKES):
        depth.taken(waited_s=0.0)
    assert depth.value == 1, "one step is always read ahead"
    assert PrefetchDepth(1).value == 1


@pytest.fixture
def planned(dataset: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "plan.arrow"
    plan(dataset, PlanSpec(token_budget=4096)).write(path)
    return path


def test_a_child_that_a_rank_forks_lets_go_of_nothing(dataset: Dataset, planned: Path) -> None:
    """A `DataLoader` worker, say: it inherits the arrays, and collects its copies of them."""
    keys = dataset.metadata(["sample"])["sample"].to_pylist()
    with Loader(dataset.folder, planned, name=uuid.uuid4().hex, memory_bytes_max=2 << 20, timeout_s=20) as source:
        batch = source.next()
        assert batch is not None
        expected = [sample.tokens.array("token_ids").copy() for sample in batch.samples]
        pid = os.fork()
        if pid == 0:
            try:
                batch.release()
                source.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        rest = sum(len(later.samples) for later in source)  # more steps than fit beside the first
        assert rest + len(batch.samples) == len(keys)
        for sample, tokens in zip(batch.samples, expected, strict=True):
            np.testing.assert_array_equal(sample.tokens.array("token_ids"), tokens)


def test_helpers_leave_with_a_reader_that_is_killed(dataset: Dataset, planned: Path) -> None:
    """And with them the last that maps its memory, but for what the rank holds."""
    with Loader(dataset.folder, planned, name=uuid.uuid4().hex, reader_processes=3, timeout_s=20) as source:
        assert source.next() is not None
        children = psutil.Process(source.reader_pid).children()
        assert len(children) == 2
        os.kill(source.reader_pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_a_long_name_is_an_address_too() -> None:
    name = "/a/path/of/a/dataset" * 10
    sock = listen(name)
    assert sock is not None
    with sock:
        assert listen(name) is None, "the name is taken"
        peer = connect(name)
        assert peer is not None
        peer.close()
        assert connect(name + "x") is None
