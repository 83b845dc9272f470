"""The files are plain Arrow: four other readers open them as they are, and a million tokens go through them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_wal.dataset import Dataset, DatasetWriter, Masked, Sample, open_dataset
from rollout_wal.dataset.columns import ColumnSpec, encode
from rollout_wal.dataset.inflate import HEAD_SLACK_BYTES, inflate


@pytest.fixture(params=["none", "zstd"])
def dataset(tmp_path: Path, make_sample: Callable[..., Sample], request: pytest.FixtureRequest) -> Dataset:
    writer = DatasetWriter(
        tmp_path, writer_id="w", compression={"tokens": request.param}, default_compression=request.param
    )
    writer.seal([make_sample(i, response=50 + 900 * i, teacher="math") for i in range(4)])
    writer.seal([make_sample(i, response=3, teacher="math") for i in range(4, 7)])
    return open_dataset(tmp_path)


@pytest.fixture
def expected(make_sample: Callable[..., Sample]) -> list[Sample]:
    return [make_sample(i, response=50 + 900 * i, teacher="math") for i in range(4)] + [
        make_sample(i, response=3, teacher="math") for i in range(4, 7)
    ]


def test_pyarrow(dataset: Dataset, expected: list[Sample]) -> None:
    metadata = arrow_dataset.dataset(dataset.files(), format="ipc").to_table()
    assert metadata["sample"].to_pylist() == [s.key for s in expected]
    tokens = arrow_dataset.dataset(dataset.files("tokens"), format="ipc").to_table()
    assert tokens["token_ids"].to_pylist() == [s.token_ids.tolist() for s in expected]
    first = expected[0].logprobs
    assert first is not None
    assert [v is not None for v in tokens["logprobs"][0].as_py()] == first.valid.tolist()
    topk = arrow_dataset.dataset(dataset.files("teacher.math"), format="ipc").to_table(columns=["topk_ids"])
    assert topk["topk_ids"][1].as_py() == expected[1].groups["teacher.math"].columns["topk_ids"].tolist()


def test_polars(dataset: Dataset, expected: list[Sample]) -> None:
    frame = polars.concat([polars.read_ipc(path) for path in dataset.files()])
    assert frame["reward"].to_list() == [s.reward for s in expected]
    tokens = polars.concat([polars.read_ipc(path) for path in dataset.files("tokens")])
    assert tokens["token_ids"].to_list() == [s.token_ids.tolist() for s in expected]
    missing = tokens["logprobs"].list.eval(polars.element().is_null()).list.sum()
    assert missing.to_list() == [s.prompt_length for s in expected], "a missing logprob is a null"
    teacher = polars.concat([polars.read_ipc(path) for path in dataset.files("teacher.math")])
    assert teacher["topk_ids"][2].to_list() == expected[2].groups["teacher.math"].columns["topk_ids"].tolist()


def test_duckdb(dataset: Dataset, expected: list[Sample]) -> None:
    metadata = arrow_dataset.dataset(dataset.files(), format="ipc")
    tokens = arrow_dataset.dataset(dataset.files("tokens"), format="ipc")
    connection = duckdb.connect()
    connection.register("metadata", metadata)
    connection.register("tokens", tokens)
    found = connection.execute(
        "select m.sample, m.response_length, len(t.token_ids), list_sum(t.loss_mask), list_sum(t.logprobs) "
        "from metadata m join tokens t using (sample) order by m.rollout"
    ).fetchall()
    for (key, response, length, trained, logprob), sample in zip(found, expected, strict=True):
        assert (key, response, length, trained) == (
            sample.key,
            sample.response_length,
            sample.length,
            sample.response_length,
        )
        assert sample.logprobs is not None
        assert logprob == pytest.approx(float(sample.logprobs.values[sample.logprobs.valid].sum()), rel=1e-4)


def test_hugging_face_datasets(dataset: Dataset, expected: list[Sample], tmp_path: Path) -> None:
    import datasets

    for group in (None, "tokens", "teacher.math"):
        loaded = datasets.load_dataset(
            "arrow", data_files=[str(p) for p in dataset.files(group)], split="train", cache_dir=str(tmp_path / "hf")
        )
        assert loaded["sample"][:] == [s.key for s in expected]
        if group == "tokens":
            assert loaded[1]["token_ids"] == expected[1].token_ids.tolist()
            assert loaded[1]["logprobs"][0] is None
        if group == "teacher.math":
            topk = expected[1].groups["teacher.math"].columns["topk_ids"]
            np.testing.assert_array_equal(np.array(loaded[1]["topk_ids"]), topk)


MILLION = """
import os, resource, sys, uuid
from dataclasses import replace
from pathlib import Path
import numpy as np
from rollout_wal.backend.finished import FinishedRollout
from rollout_wal.dataset import ColumnGroup, DatasetWriter, PlanSpec, open_dataset, plan
from rollout_wal.dataset.collate import collate_packed
from rollout_wal.dataset.loader import Loader
from rollout_wal.delivery import to_sample
from rollout_wal.engines.base import EngineInfo, FinishReason
from rollout_wal.log.policy import SyncPolicy
from rollout_wal.params import SamplingParams
from rollout_wal.wal import RolloutWal

folder, length = Path(sys.argv[1]), int(sys.argv[2])
prompt_length = 1000
rng = np.random.default_rng(0)
token_ids = rng.integers(0, 150_000, length, dtype=np.int32)
logprobs = -rng.exponential(size=length).astype(np.float32)
topk = ColumnGroup({"topk_ids": rng.integers(0, 150_000, (length, 8), dtype=np.int32)})
info = EngineInfo("test", "1", "a" * 32, "b" * 32, "c" * 32, "d" * 32, 150_000, 1 << 21, (0,))
sampling = SamplingParams(max_tokens=length)


def engine(name, start, stop, attempt, rollout):
    # A worker that logs its steps and dies without closing anything, a thousand tokens behind its last sync.
    pid = os.fork()
    if pid == 0:
        wal_path = folder / "wal"
        from rollout_wal.engine_log import EngineLog
        log = EngineLog.open(wal_path / "engines" / name, policy=SyncPolicy("group"))
        log.engine({"engine": "test"})
        log.policy(attempt, "b" * 32)
        log.bind(0, rollout, attempt, start - prompt_length)
        slot, running = np.zeros(1, np.uint16), np.zeros(1, np.uint8)

        def sample_until(at, end):
            lsn = 0
            while at < end:
                # A token at a time, then several, as an engine that speculates does.
                count = 1 if at < start + 50_000 else min(8, end - at)
                here = slice(at, at + count)
                lsn = log.append_step(slot, token_ids[here].astype(np.uint32), running, logprobs[here], logprobs[here],
                                      count_R=np.array([count], np.uint16))
                at += count
            return lsn

        log.wait_durable(sample_until(start, stop))
        sample_until(stop, min(stop + 1000, length))
        os.kill(os.getpid(), 9)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == 9


wal = RolloutWal.open(folder / "wal")
wal.declare_engine(info)
rollout = wal.begin(token_ids[:prompt_length], sampling, seed=1)
for attempt, stop in ((1, 600_000), (2, length)):
    record = wal.attempt(rollout, str(attempt))
    assert record.attempt == attempt
    wal.log.wait_durable()
    wal.close()
    engine(str(attempt), record.start + prompt_length, stop, attempt, rollout)
    wal = RolloutWal.open(folder / "wal")  # recovery
    assert prompt_length + len(wal.tokens(rollout)) >= stop, "durable tokens were lost"
wal.finish(rollout, FinishReason.MAX_TOKENS)
wal.log.wait_durable()
wal.close()
wal = RolloutWal.open(folder / "wal")
output = wal.tokens(rollout)
assert np.array_equal(output.token_T, token_ids[prompt_length:])
assert set(output.version_T.tolist()) == {1, 2}
state = wal.rollout(rollout)
finished = FinishedRollout(rollout, "long", "", 0, "", state.begin.prompt, output, FinishReason.MAX_TOKENS, None, 1, 1,
                           {})
sample = replace(to_sample(finished, info, sampling), groups={"teacher.math": topk})
assert np.array_equal(sample.logprobs.values[prompt_length:], logprobs[prompt_length:])

for compression in ("none", "zstd"):
    where = folder / compression
    DatasetWriter(where, writer_id="w", check_fence=wal.log.fence.check, compression={"tokens": compression},
                  default_compression=compression).seal([sample])
    made = plan(open_dataset(where), PlanSpec(token_budget=length))
    made.write(where / "plan.arrow")
    with Loader(where, where / "plan.arrow", name=uuid.uuid4().hex, groups=("tokens", "teacher.math"),
                memory_bytes_max=1 << 28, timeout_s=60) as loader:
        for batch in loader:
            packed = collate_packed(batch.samples, ("logprobs", "teacher.math.topk_ids"))
            assert packed.input_ids.shape == (length,)
            assert np.array_equal(packed.input_ids.numpy(), token_ids)
            assert np.array_equal(packed.columns["teacher.math.topk_ids"].numpy(), topk.columns["topk_ids"])
            reader = Path(f"/proc/{loader.reader_pid}/status").read_text()
            peak = next(int(l.split()[1]) for l in reader.splitlines() if l.startswith("VmHWM"))
            print(peak * 1024, flush=True)
wal.delivered([rollout])
wal.release([rollout])
wal.log.wait_durable()
wal.close()
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(who).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_million_tokens_under_two_gib(tmp_path: Path) -> None:
    """Logging by workers that are killed, recovery, sealing, planning, loading, collating; each process is measured."""
    command = [sys.executable, "-c", MILLION, str(tmp_path), "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *readers, rank, worker = (int(line) for line in done.stdout.split())
    assert len(readers) == 2
    assert rank + max(*readers, worker) < 2 << 30


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=4), st.booleans(), st.integers(0, 2**32 - 1))
def test_an_inflated_message_is_the_batch(lengths: list[int], compressible: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = {
        "ids": [rng.integers(0, 3 if compressible else 2**31 - 1, n).astype(np.int32) for n in lengths],
        "scores": [Masked(rng.random(n).astype(np.float32), rng.random(n) < 0.5) for n in lengths],
        "states": [rng.integers(0, 99, (n, 3)).astype(np.uint16) for n in lengths],
    }
    specs = [ColumnSpec("ids", "int32"), ColumnSpec("scores", "float32"), ColumnSpec("states", "bfloat16", 3)]
    batch = pa.record_batch([encode(s, columns[s.name]) for s in specs], schema=pa.schema([s.field for s in specs]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
        start = sink.tell()
        writer.write_batch(batch)
        stop = sink.tell()
    packed = bytearray(memoryview(sink.getvalue())[start:stop])
    into = bytearray(pa.ipc.get_record_batch_size(batch) + HEAD_SLACK_BYTES)
    whole = bytes(packed)
    inflate(packed, memoryview(into), zstandard.ZstdDecompressor())
    message = pa.ipc.read_message(pa.py_buffer(into))
    assert pa.ipc.read_record_batch(message, batch.schema).equals(batch)
    for cut in (7, 30, len(whole) // 2):
        with pytest.raises((ValueError, zstandard.ZstdError)):
            inflate(bytearray(whole[:cut]), memoryview(bytearray(len(into))), zstandard.ZstdDecompressor())
    with pytest.raises(ValueError, match="not compressed"):
        inflate(bytearray(batch.serialize()), memoryview(into), zstandard.ZstdDecompressor())


def test_a_column_says_what_its_bits_are(dataset: Dataset) -> None:
    with pa.ipc.open_file(dataset.files("tokens")[0]) as file:
        assert file.schema.metadata[b"rollout_wal.format"] == b"1"
        assert file.schema.metadata[b"rollout_wal.group"] == b"tokens"
