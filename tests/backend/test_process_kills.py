"""The backend's own process is killed and started again: every rollout once, token for token; and who owns a log."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from rollout_wal.backend import RolloutBackend
from rollout_wal.errors import LogFenced, LogOwned, LogPoisoned, LogTooNew
from rollout_wal.log.format import FORMAT_VERSION, SEGMENT_HEADER_BYTES
from rollout_wal.params import SamplingParams

SAMPLING = SamplingParams(max_tokens=150)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def check_lives(lines: list[dict[str, Any]], expected: list[list[int]]) -> None:
    """All lives of a job together: each rollout, and what was consumed never again."""
    consumed: set[str] = set()
    delivered: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["event"] == "delivered":
            key = line["key"]
            assert key not in consumed, f"{key} was consumed, and came again"
            assert line["tokens"] == expected[int(key.partition("/")[2])]
            if key in delivered:
                assert line["id"] == delivered[key]["id"]
                assert line["logprobs"] == delivered[key]["logprobs"]
                assert line["versions"] == delivered[key]["versions"]
            delivered[key] = line
        elif line["event"] == "consumed":
            consumed.add(line["key"])
    assert len(delivered) == len(expected)


def run_through(job: Callable[..., Any], until: Any, times: list[float], number: int, **config: Any) -> Any:
    """Kill the job so many seconds after it has delivered something in each life; then let it end."""
    for life, seconds in enumerate(times):
        process = job(**config)
        until(lambda process=process, life=life: len(process.events("started")) > life, 60)
        pids = process.events("started")[-1]["pids"]

        def has_moved(process: Any = process, before: int = len(process.events("delivered"))) -> bool:
            return len(process.events("delivered")) > before or process.process.poll() is not None

        until(has_moved, 60)
        time.sleep(seconds)
        os.kill(process.process.pid, number)
        process.process.wait(30)
        if life % 2:  # else the next life meets what is left of this one
            until(lambda pids=pids: not any(alive(pid) for pid in pids), 15)
    last = job(**config)
    assert last.process.wait(120) == 0, last.lines()[-1]
    return last


def test_a_killed_backend_goes_on(job: Any, until: Any, reference: Any, prompts: Any) -> None:
    last = run_through(job, until, [0.05, 0.2], signal.SIGKILL, group_size=8)
    check_lives(last.lines(), reference(prompts, SAMPLING, group_size=8, cohort="job"))
    assert last.events("done")[-1]["holds"]
    # A life that was killed while it held rollouts that it had not consumed hands them out again.
    assert any(line["again"] for line in last.events("delivered"))


@pytest.mark.slow
def test_a_backend_killed_again_and_again_goes_on(job: Any, until: Any, reference: Any, prompts: Any) -> None:
    rng = random.Random(3)
    times = [rng.expovariate(1 / 0.2) for _ in range(8)]
    last = run_through(job, until, times, signal.SIGKILL, group_size=40)
    check_lives(last.lines(), reference(prompts, SAMPLING, group_size=40, cohort="job"))
    assert last.events("done")[-1]["holds"]


@pytest.mark.slow
def test_a_backend_that_is_given_notice_goes_on(job: Any, until: Any, reference: Any, prompts: Any) -> None:
    last = run_through(job, until, [0.1, 0.3], signal.SIGTERM, group_size=24)
    check_lives(last.lines(), reference(prompts, SAMPLING, group_size=24, cohort="job"))


@pytest.mark.slow
def test_killed_while_it_starts(job: Any, until: Any, reference: Any, prompts: Any) -> None:
    for seconds in (0.8, 1.6):
        process = job(group_size=2)
        time.sleep(seconds)
        process.process.kill()
        process.process.wait()
    last = job(group_size=2)
    assert last.process.wait(60) == 0
    check_lives(last.lines(), reference(prompts, SAMPLING, group_size=2, cohort="job"))


def test_one_owner(job: Any, until: Any, backend: Callable[..., RolloutBackend], reference: Any, prompts: Any) -> None:
    owner = job(group_size=2, linger=True)
    until(lambda: owner.events("done"), 60)
    (started,) = owner.events("started")
    with pytest.raises(LogOwned, match=rf"in use by pid {owner.process.pid}.*take_over=True"):
        backend().start()
    # A taker is told of by nobody: it fences the owner's job log and its workers' logs, and goes on.
    with backend(take_over=True) as taker:
        rollouts = list(taker.generate(prompts, SAMPLING, group_size=2, cohort="job"))
        unused = {line["key"] for line in owner.events("delivered")} - {
            line["key"] for line in owner.events("consumed")
        }
        assert {r.key for r in rollouts} == unused
        more = list(taker.generate(prompts, SAMPLING, seed=5))
        assert {r.index: r.tokens.tolist() for r in more} == dict(enumerate(reference(prompts, SAMPLING, seed=5)))
    # Its processes end with it, though it was busy with nothing.
    owner.process.kill()
    until(lambda: not any(alive(pid) for pid in started["pids"]), 15)


def test_a_fenced_backend_stops(backend: Callable[..., RolloutBackend], prompts: Any) -> None:
    with backend() as first:
        iterator = first.generate(prompts, SamplingParams(max_tokens=1500, ignore_eos=True), cohort="c")
        with backend(take_over=True) as second:
            with pytest.raises(LogFenced):
                list(iterator)
            with pytest.raises(LogFenced):
                first.balance()
            rollouts = list(second.generate(prompts, SamplingParams(max_tokens=1500, ignore_eos=True), cohort="c"))
            assert len(rollouts) == 8
            assert second.balance().holds


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes of this process behind that offset of a file fail. Its children have their own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_job_log_that_cannot_be_written_stops_the_backend(
    backend: Callable[..., RolloutBackend], reference: Any, prompts: Any
) -> None:
    taken: dict[int, Any] = {}
    with backend() as b:
        iterator = b.generate(prompts, SAMPLING, group_size=8, cohort="c")
        for _ in range(5):
            r = next(iterator)
            taken[r.id] = r
        b.consumed(list(taken), epoch=0, step=0)
        with file_size_limit(4096):
            with pytest.raises(LogPoisoned, match=r"File too large.*Cure the disk"):
                taken.update({r.id: r for r in iterator})
            with pytest.raises(LogPoisoned):
                b.generate(prompts, SAMPLING)
            with pytest.raises(LogPoisoned):
                b.balance()
    with backend() as b:
        rest = list(b.generate(prompts, SAMPLING, group_size=8, cohort="c"))
        assert b.balance().holds
    expected = reference(prompts, SAMPLING, group_size=8, cohort="c")
    assert len(rest) == 64 - 5
    for r in [*taken.values(), *rest]:
        assert r.tokens.tolist() == expected[r.index]


@pytest.mark.slow
def test_a_full_disk_at_the_start_is_told(job: Any, reference: Any, prompts: Any) -> None:
    # A limit below the size of a segment: no log can make its first one.
    failing = job(group_size=4, max_file_bytes=100_000)
    assert failing.process.wait(60) == 1
    (failed,) = failing.events("failed")
    assert "File too large" in failed["error"]
    assert "Cure the disk" in failed["error"]
    last = job(group_size=4)
    assert last.process.wait(60) == 0
    check_lives(
        [x for x in last.lines() if x["event"] != "failed"], reference(prompts, SAMPLING, group_size=4, cohort="job")
    )


def test_a_newer_format_is_refused(backend: Callable[..., RolloutBackend], prompts: Any, tmp_path: Path) -> None:
    with backend(workers=1) as b:
        list(b.generate(prompts[:1], SAMPLING))
    segments = sorted((tmp_path / "wal" / "job").glob("*.seg"))
    original = {path: path.read_bytes() for path in segments}
    for path, data in original.items():
        header = data[:8] + (FORMAT_VERSION + 1).to_bytes(2, "little") + data[10 : SEGMENT_HEADER_BYTES - 4]
        path.write_bytes(header + crc32c(header).to_bytes(4, "little") + data[SEGMENT_HEADER_BYTES:])
    with pytest.raises(LogTooNew, match="Upgrade rollout-wal"):
        backend().start()
    for path, data in original.items():
        path.write_bytes(data)
    with backend() as b:
        assert len(list(b.generate(prompts[:1], SAMPLING))) == 1
