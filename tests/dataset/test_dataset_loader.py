"""The loader with real processes: one reader, shared pages, and either end killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout_wal.dataset import DatasetWriter, PlanSpec, Sample, open_dataset, plan
from rollout_wal.dataset.arena import Arena
from rollout_wal.dataset.errors import LoaderError
from rollout_wal.dataset.loader import Loader
from rollout_wal.dataset.node_reader import NodeReader
from rollout_wal.dataset.reader_config import ReaderConfig
from rollout_wal.dataset.wire import PROTOCOL, connect, listen, send

RANKS = 2


@pytest.fixture
def name() -> Iterator[str]:
    """A reader's name; afterwards no reader of that name may be left."""
    name = uuid.uuid4().hex
    yield name
    gc.collect()
    deadline = time.monotonic() + 10
    while name in Path("/proc/net/unix").read_text():
        assert time.monotonic() < deadline, "the reader has outlived its ranks"
        time.sleep(0.02)


@pytest.fixture
def sealed(tmp_path: Path, make_sample: Callable[..., Sample]) -> tuple[Path, Path, list[Sample]]:
    """Samples with and without compression, planned for two ranks."""
    samples = [make_sample(i, response=40 + 37 * i % 1500, teacher="math") for i in range(120)]
    folder = tmp_path / "data"
    DatasetWriter(folder, writer_id="w", compression={"teacher.math": "zstd"}).seal(samples)
    path = tmp_path / "plan.arrow"
    plan(open_dataset(folder), PlanSpec(token_budget=4096, ranks=RANKS)).write(path)
    return folder, path, samples


def loader(sealed: tuple[Path, Path, Any], name: str, local_rank: int = 0, **values: Any) -> Loader:
    folder, path, _ = sealed
    defaults: dict[str, Any] = {"local_ranks": RANKS, "timeout_s": 20.0, "groups": ("tokens", "teacher.math")}
    return Loader(folder, path, name=name, local_rank=local_rank, **(defaults | values))


def alone(sealed: tuple[Path, Path, Any], name: str, **values: Any) -> Loader:
    """One local rank that is sent both data ranks' samples."""
    return loader(sealed, name, local_ranks=1, data_ranks=(0, 1), **values)


def in_threads(work: Callable[[int], None], count: int) -> list[BaseException]:
    """Run `work(rank)` for each rank; what they raised."""
    raised: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_two_ranks_get_every_sample_once_as_it_was_sealed(sealed: tuple[Path, Path, Any], name: str) -> None:
    samples = {s.key: s for s in sealed[2]}
    seen: list[str] = []

    def work(rank: int) -> None:
        with loader(sealed, name, rank) as source:
            for number, batch in enumerate(source):
                assert batch.step == number
                for sample in batch.samples:
                    tokens = sample.tokens
                    original = samples[tokens.key]
                    assert sample.length == original.length
                    np.testing.assert_array_equal(tokens.array("token_ids"), original.token_ids)
                    logprobs, expected = tokens["logprobs"], original.logprobs
                    np.testing.assert_array_equal(logprobs.valid, expected.valid)
                    np.testing.assert_array_equal(logprobs.values[expected.valid], expected.values[expected.valid])
                    teacher = sample.group("teacher.math")
                    assert teacher is not None
                    np.testing.assert_array_equal(
                        teacher.array("topk_ids"), original.groups["teacher.math"].columns["topk_ids"]
                    )
                    seen.append(tokens.key)

    assert in_threads(work, RANKS) == []
    assert sorted(seen) == sorted(samples)


def memory_of(pid: int | str) -> dict[str, int]:
    """Bytes of the loader's shared memory that a process maps: {"Size", "Rss", "Pss", "Private_Dirty"}."""
    totals = dict.fromkeys(("Size", "Rss", "Pss", "Private_Dirty"), 0)
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            inside = "memfd:rollout-wal-loader" in line
        elif inside and head[:-1] in totals:
            totals[head[:-1]] += int(line.split()[1]) * 1024
    return totals


def test_arrays_are_the_shared_pages_themselves(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name) as source:
        batch = source.next()
        assert batch is not None
        total = 0
        for sample in batch.samples:
            for row in (sample.tokens, sample.group("teacher.math")):
                assert row is not None
                for column in row:
                    values = row[column]
                    values = getattr(values, "values", values)
                    total += int(np.asarray(values).sum() != 12345)
        mine = memory_of("self")
        assert total
        assert mine["Rss"] > 0
        assert mine["Private_Dirty"] == 0, "reading has copied pages"
        reader = memory_of(source.reader_pid)
        assert reader["Rss"] >= mine["Rss"]

        tokens = batch.samples[0].tokens.array("token_ids")
        tensor = torch.from_numpy(tokens)  # warns, which is an error here, if the array is read-only
        assert tensor.data_ptr() == tokens.ctypes.data
        before = tokens.copy()
        tensor += 1  # this rank's own page from here on
        np.testing.assert_array_equal(tokens, before + 1)
        other = alone(sealed, name + "-other", start_step=0)
        again = other.next()
        assert again is not None
        np.testing.assert_array_equal(again.samples[0].tokens.array("token_ids"), before)
        other.close()


def test_what_is_held_is_never_overwritten(sealed: tuple[Path, Path, Any], name: str) -> None:
    """Arrays and tensors that outlive their step, the loop and the loader, with memory for a few steps only."""
    samples = {s.key: s for s in sealed[2]}
    kept: list[tuple[str, torch.Tensor]] = []
    with alone(sealed, name, groups=("tokens",), memory_bytes_max=1 << 20) as source:
        for batch in source:
            if batch.step % 4 == 0:
                row = batch.samples[0].tokens
                kept.append((row.key, torch.from_numpy(row.array("token_ids"))))
                del row
    del batch
    assert len(kept) >= 3
    for key, tensor in kept:
        np.testing.assert_array_equal(tensor.numpy(), samples[key].token_ids)
    kept.clear()


def test_a_full_memory_holds_the_reader_back_and_letting_go_frees_it(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name, memory_bytes_max=600_000, timeout_s=1.0) as source:
        held: list[Any] = []

        def hoard() -> None:
            while True:
                held.append(source.next())

        with pytest.raises(LoaderError, match=r"still holds the steps \[0"):
            hoard()
        assert 0 < len(held) < source.steps
        assert memory_of(source.reader_pid)["Rss"] <= 600_000
        held.clear()
        count = sum(1 for _ in source)
        assert count > 0


def test_a_step_is_freed_only_when_its_last_rank_lets_go(sealed: tuple[Path, Path, Any], name: str) -> None:
    connected = threading.Barrier(RANKS)
    counts = [0, 0]

    def work(rank: int) -> None:
        with loader(sealed, name, rank, memory_bytes_max=900_000, timeout_s=5.0) as source:
            connected.wait()
            for _ in source:
                counts[rank] += 1
                if rank == 1:
                    time.sleep(0.02)
                # The fast rank runs ahead by no more than what fits into memory.
                assert counts[0] - counts[1] < 8

    assert in_threads(work, RANKS) == []
    assert counts[0] == counts[1] > 8


def test_a_job_resumes_from_its_step_counter(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name) as source:
        whole = [[s.tokens.key for s in b.samples] for b in source]
    with alone(sealed, name + "-resumed", start_step=5) as source:
        rest = [(b.step, [s.tokens.key for s in b.samples]) for b in source]
    assert rest == list(enumerate(whole))[5:]


RANK_THAT_HANGS = """
import sys, time
from rollout_wal.dataset.loader import Loader
folder, plan, name, policy = sys.argv[1:]
source = Loader(folder, plan, name=name, local_rank=1, local_ranks=2, on_rank_death=policy,
                groups=("tokens", "teacher.math"), memory_bytes_max=900_000, timeout_s=20.0)
batch = source.next()
print("holding", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("policy", ["carry_on", "stop"])
def test_a_rank_that_is_killed_holds_nothing(sealed: tuple[Path, Path, Any], name: str, policy: Any) -> None:
    folder, path, _ = sealed
    command = [sys.executable, "-c", RANK_THAT_HANGS, str(folder), str(path), name, policy]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim,
        loader(sealed, name, 0, memory_bytes_max=900_000, on_rank_death=policy) as source,
    ):
        assert victim.stdout is not None
        assert victim.stdout.readline() == "holding\n"
        assert source.next() is not None
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        if policy == "stop":
            with pytest.raises(LoaderError, match="local rank 1 died"):
                for _ in source:
                    pass
        else:
            # More steps than fit into memory at once, so what the dead rank held is used again.
            assert sum(1 for _ in source) == source.steps - 1


def test_a_rank_that_goes_away_in_the_handshake_takes_nobody_along(sealed: tuple[Path, Path, Any], name: str) -> None:
    folder, path, samples = sealed
    config = ReaderConfig(
        name=name,
        dataset=str(folder.resolve()),
        plan=str(path.resolve()),
        groups=("tokens", "teacher.math"),
        need_all=True,
        local_ranks=RANKS,
        data_ranks=(0, 1),
        memory_bytes_max=1 << 30,
        prefetch_max=8,
        processes=1,
        stop_on_rank_death=True,
        start_timeout_s=5.0,
    )
    listener, gone = listen(name), connect(name)
    assert listener is not None
    assert gone is not None
    hello = {"kind": "hello", "protocol": PROTOCOL, "config": config.pack(), "local_rank": 1, "start_step": 0}
    send(gone, hello)
    gone.close()  # killed, or tired of waiting, before the reader looked
    seen: list[str] = []

    def work(rank: int) -> None:
        if rank == RANKS:
            NodeReader(config, listener).run()
            return
        values = {"reader_processes": 1, "on_rank_death": "stop", "start_timeout_s": 5.0}
        with loader(sealed, name, rank, **values) as source:
            for batch in source:
                seen.extend(sample.tokens.key for sample in batch.samples)

    assert in_threads(work, RANKS + 1) == []
    listener.close()
    assert sorted(seen) == sorted(s.key for s in samples)


def test_a_reader_that_is_killed_is_a_clear_error(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name, prefetch_max=1) as source:
        batch = source.next()
        assert batch is not None
        tokens = batch.samples[0].tokens.array("token_ids")
        before = tokens.copy()
        os.kill(source.reader_pid, signal.SIGKILL)
        with pytest.raises(LoaderError, match="died before step"):
            for _ in source:
                pass
        np.testing.assert_array_equal(tokens, before)


def test_a_reader_that_is_killed_is_started_again(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name) as source:
        whole = [[s.tokens.key for s in b.samples] for b in source]
    pids = set()
    seen: list[list[str]] = []
    with alone(sealed, name + "-restarted", on_reader_death="restart", prefetch_max=2) as source:
        for batch in source:
            seen.append([s.tokens.key for s in batch.samples])
            if batch.step in (2, 6):
                os.kill(source.reader_pid, signal.SIGKILL)
            pids.add(source.reader_pid)
    assert seen == whole
    assert len(pids) == 3


def test_ranks_that_disagree_are_refused(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name) as source:
        with pytest.raises(LoaderError, match="this rank asks for"):
            alone(sealed, name, prefetch_max=3)
        with pytest.raises(LoaderError, match=r"connected to reader .* already"):
            alone(sealed, name)
        with pytest.raises(LoaderError, match="not among this node's"):
            alone(sealed, name, data_rank=7)
        assert source.next() is not None


def test_a_step_that_never_fits_is_an_error(sealed: tuple[Path, Path, Any], name: str) -> None:
    with alone(sealed, name, memory_bytes_max=4096) as source, pytest.raises(LoaderError, match="memory_bytes_max"):
        source.next()


def test_a_payload_file_cut_short_is_named(sealed: tuple[Path, Path, Any], name: str) -> None:
    folder, path, _ = sealed
    (payload,) = open_dataset(folder).files("tokens")
    with alone(sealed, name, prefetch_max=1) as source:
        assert source.next() is not None
        os.truncate(payload, 1000)
        with pytest.raises(LoaderError, match=rf"{payload.name} cannot be used: it ends before byte"):
            for _ in source:
                pass
    with pytest.raises(LoaderError, match="the manifest says"):
        Loader(folder, path, name=name + "-again", local_ranks=1, data_ranks=(0, 1), timeout_s=10)


def test_extents_are_used_again_and_joined() -> None:
    arena = Arena(10 * 4096)
    extents = [arena.allocate(4096) for _ in range(10)]
    assert extents == [i * 4096 for i in range(10)]
    assert arena.allocate(1) is None
    for offset in (3 * 4096, 5 * 4096, 4 * 4096):
        arena.deallocate(offset, 4096)
    assert arena.allocate(3 * 4096) == 3 * 4096
    for i in range(10):
        if i not in (4, 5):
            arena.deallocate(i * 4096, 4096 if i != 3 else 3 * 4096)
    arena.memory_B[:] = 7
    arena.give_back()
    assert not arena.memory_B.any(), "the pages were not returned"
    assert arena.allocate(10 * 4096) == 0
