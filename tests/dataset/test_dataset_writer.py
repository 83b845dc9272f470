"""Sealing: what goes in comes out, once, whatever dies when."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_wal.dataset import DatasetWriter, Masked, Sample, extras_from_json, extras_to_json, open_dataset
from rollout_wal.dataset.errors import DatasetMismatch, DatasetPoisoned
from rollout_wal.dataset.storage import Storage

MakeSample = Callable[..., Sample]


def assert_same_column(found: object, expected: object) -> None:
    if isinstance(expected, Masked):
        if expected.valid.all():
            np.testing.assert_array_equal(found, expected.values)
            return
        assert isinstance(found, Masked)
        np.testing.assert_array_equal(found.valid, expected.valid)
        np.testing.assert_array_equal(found.values[found.valid], expected.values[expected.valid])
        assert not found.values[~found.valid].any()
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_is_sealed_comes_out(tmp_path: Path, make_sample: MakeSample, compression: str) -> None:
    samples = [make_sample(i, response=r, teacher="math") for i, r in enumerate([1, 7, 900, 40_000, 0, 3])]
    writer = DatasetWriter(
        tmp_path, writer_id="w", compression={"tokens": compression}, default_compression=compression
    )
    info = writer.seal(samples)
    assert info.added == tuple(s.key for s in samples)
    assert info.bytes >= sum(p.stat().st_size for p in tmp_path.rglob("*.arrow"))

    dataset = open_dataset(tmp_path)
    assert dataset.num_samples == len(samples)
    assert dataset.groups == ("tokens", "teacher.math")
    rows = dataset.metadata().to_pylist()
    for row, sample in zip(rows, samples, strict=True):
        assert row["sample"] == sample.key
        assert row["seed"] == sample.seed
        assert row["reward"] == sample.reward
        assert (row["prompt_length"], row["response_length"]) == (sample.prompt_length, sample.response_length)
        assert row["loss_tokens"] == sample.response_length
        assert row["policy_version_start"] == (3 if sample.response_length else None)
        payload = dataset.payload(sample.key)
        assert payload is not None
        assert payload.key == sample.key
        np.testing.assert_array_equal(payload.array("token_ids"), sample.token_ids)
        np.testing.assert_array_equal(payload.array("segment_kinds"), sample.segment_kinds)
        np.testing.assert_array_equal(payload.array("loss_mask"), sample.segment_kinds == 3)
        assert_same_column(payload["logprobs"], sample.logprobs)
        assert_same_column(payload["sampling_logprobs"], sample.sampling_logprobs)
        runs = zip(payload.array("policy_versions"), payload.array("policy_version_tokens"), strict=True)
        assert tuple(runs) == sample.policy_runs
        teacher = dataset.payload(sample.key, "teacher.math")
        assert teacher is not None
        for name, column in sample.groups["teacher.math"].columns.items():
            assert_same_column(teacher[name], column)


def test_byte_ranges_are_exactly_the_batches(tmp_path: Path, make_sample: MakeSample) -> None:
    """Including the first batch, which Arrow writes together with the head of the file."""
    DatasetWriter(tmp_path, writer_id="w").seal([make_sample(i, response=2000) for i in range(5)])
    dataset = open_dataset(tmp_path)
    table = dataset.metadata()
    (path,) = dataset.files("tokens")
    raw = path.read_bytes()
    with pa.ipc.open_file(path) as file:
        for row in table.to_pylist():
            message = raw[row["payload_offset"] : row["payload_offset"] + row["payload_bytes"]]
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(message), file.schema)
            assert batch.equals(file.get_batch(row["payload_batch"]))
            assert batch.column("sample")[row["payload_row"]].as_py() == row["sample"]


def test_sealing_again_adds_nothing(tmp_path: Path, make_sample: MakeSample) -> None:
    samples = [make_sample(i) for i in range(4)]
    writer = DatasetWriter(tmp_path, writer_id="w")
    first = writer.seal(samples[:3])
    again = writer.seal(samples)
    assert (again.added, again.present) == (("job/3",), ("job/0", "job/1", "job/2"))
    other = DatasetWriter(tmp_path, writer_id="x").seal(samples)
    assert (other.added, other.version, other.bytes) == ((), again.version, 0)
    assert first.version == 1
    assert open_dataset(tmp_path).metadata(["sample"])["sample"].to_pylist() == [s.key for s in samples]
    assert open_dataset(tmp_path, version=1).num_samples == 3


def test_the_same_key_with_other_tokens_is_refused(tmp_path: Path, make_sample: MakeSample) -> None:
    writer = DatasetWriter(tmp_path, writer_id="w")
    writer.seal([make_sample(1)])
    with pytest.raises(DatasetMismatch, match="checksum"):
        writer.seal([make_sample(2, key="job/1")])
    with pytest.raises(DatasetMismatch, match="more than once"):
        writer.seal([make_sample(3), make_sample(3)])
    assert open_dataset(tmp_path).num_samples == 1


def test_writers_that_race_add_each_rollout_once(tmp_path: Path, make_sample: MakeSample) -> None:
    samples = [make_sample(i) for i in range(60)]
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            writer = DatasetWriter(tmp_path, writer_id="same")
            order = np.random.default_rng(number).permutation(len(samples))
            start.wait()
            for chunk in np.array_split(order, 10):
                writer.seal([samples[i] for i in chunk])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    dataset = open_dataset(tmp_path)
    assert sorted(dataset.metadata(["rollout"])["rollout"].to_pylist()) == list(range(60))
    # Files of lost races are gone: a reader that globs sees each row once too.
    on_disk = list(tmp_path.rglob("*.arrow"))
    assert len(on_disk) == len(dataset.files()) + len(dataset.files("tokens"))


def test_a_stale_owner_does_not_commit(tmp_path: Path, make_sample: MakeSample) -> None:
    class Fenced(Exception):
        pass

    asked: list[int] = []

    def fence() -> None:
        # Everything but the manifest is on disk, under its final name, when the question is put.
        asked.append(len(list(tmp_path.rglob("*.arrow"))))
        if len(asked) > 1:
            raise Fenced

    writer = DatasetWriter(tmp_path, writer_id="w", check_fence=fence)
    writer.seal([make_sample(0)])
    with pytest.raises(Fenced):
        writer.seal([make_sample(1)])
    assert asked == [2, 4]
    assert open_dataset(tmp_path).num_samples == 1
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


class CountingStorage(Storage):
    """Counts the system calls that matter and does `at` in place of the given one."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.calls = 0
        self.at = at
        self.act = act

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.act()

    def write(self, fd: int, data: memoryview) -> int:
        self._count()
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._count()
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._count()
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_system_call_each_rollout_is_there_once(tmp_path: Path, make_sample: MakeSample) -> None:
    """A real process, killed by SIGKILL before its n-th system call, for every n; then all of it is sealed again."""
    samples = [make_sample(i, teacher="math") for i in range(4)]
    counting = CountingStorage(0, lambda: None)
    DatasetWriter(tmp_path / "whole", writer_id="w", storage=counting).seal(samples)
    assert counting.calls > 15
    committed_by_the_dead = 0
    for at in range(1, counting.calls + 1):
        folder = tmp_path / str(at)
        pid = os.fork()
        if pid == 0:
            try:
                storage = CountingStorage(at, lambda: os.kill(os.getpid(), 9))
                DatasetWriter(folder, writer_id="w", storage=storage).seal(samples)
            finally:
                os._exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"call {at} was never reached"
        info = DatasetWriter(folder, writer_id="w").seal(samples)
        committed_by_the_dead += not info.added
        dataset = open_dataset(folder)
        assert dataset.metadata(["sample"])["sample"].to_pylist() == [s.key for s in samples]
        assert dataset.payload("job/3", "teacher.math") is not None
    assert committed_by_the_dead >= 1, "no kill fell between the commit and its acknowledgement"


def test_an_io_error_poisons_the_writer(tmp_path: Path, make_sample: MakeSample) -> None:
    samples = [make_sample(i) for i in range(3)]
    counting = CountingStorage(0, lambda: None)
    DatasetWriter(tmp_path / "whole", writer_id="w", storage=counting).seal(samples)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for at in range(1, counting.calls + 1):
        folder = tmp_path / str(at)
        storage = CountingStorage(at, fail)
        with pytest.raises(DatasetPoisoned, match="No space left"):
            DatasetWriter(folder, writer_id="w", storage=storage).seal(samples)
        DatasetWriter(folder, writer_id="w").seal(samples)
        assert open_dataset(folder).num_samples == 3

    storage = CountingStorage(counting.calls - 3, fail)
    writer = DatasetWriter(tmp_path / "again", writer_id="w", storage=storage)
    with pytest.raises(DatasetPoisoned):
        writer.seal(samples)
    calls = storage.calls
    with pytest.raises(DatasetPoisoned, match="No space left"):
        writer.seal(samples)
    assert storage.calls == calls, "a poisoned writer touched the disk again"


def test_a_folder_that_a_dead_process_made_is_made_durable(tmp_path: Path, make_sample: MakeSample) -> None:
    class Noting(Storage):
        def fsync_directory(self, path: Path) -> None:
            synced.append(path)
            super().fsync_directory(path)

    synced: list[Path] = []
    folder = tmp_path / "job" / "data"
    for name in ("manifest", "metadata", "payload/tokens"):
        (folder / name).mkdir(parents=True)  # and was killed before any sync
    writer = DatasetWriter(folder, writer_id="w", storage=Noting())
    writer.seal([make_sample(0)])
    assert {tmp_path, tmp_path / "job", folder, folder / "payload"} <= set(synced)
    assert synced.count(tmp_path / "job") == 1, "once is enough"
    shutil.rmtree(folder / "payload")
    writer.seal([make_sample(1)])
    assert synced.count(folder / "payload") == 2, "but what is made anew is synced anew"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.none() | st.integers() | st.text() | st.binary() | st.text("!1ab"), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_extras_read_back_as_what_they_were(value: Any) -> None:
    values = {"domain": "math", "!bytes": value, 3: value, "3": value}
    text = extras_to_json(values)
    assert extras_from_json(text) == values
    assert json.loads(text)["domain"] == "math", "who knows only JSON reads the rest"


def test_extras_that_are_more_than_json_do_not_stop_a_batch(tmp_path: Path, make_sample: MakeSample) -> None:
    extras = {"pair": [1, 2], 3: b"\x00x", "deep": {None: [True, {b"k": np.float32(0.5)}]}}
    writer = DatasetWriter(tmp_path, writer_id="w")
    assert writer.seal([make_sample(0), make_sample(1, extras=extras)]).added == ("job/0", "job/1")
    rows = open_dataset(tmp_path).metadata(["extras"])["extras"].to_pylist()
    assert [extras_from_json(row) for row in rows] == [{"number": 0}, extras]
    assert json.loads(rows[0]) == {"number": 0}
    for odd in (object(), {1, 2}, {(1, 2): 3}, np.arange(3)):
        with pytest.raises(DatasetMismatch, match="sample 'job/3': its extras cannot be kept as JSON"):
            writer.seal([make_sample(2), make_sample(3, extras={"odd": odd})])
    assert open_dataset(tmp_path).num_samples == 2


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys, rollout_wal.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
