"""Group commit, poison, fencing, rotation, forks and interruptions of the one writer of a log."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from rollout_wal.errors import BadInput, LogDamaged, LogFenced, LogOwned, LogPoisoned
from rollout_wal.log.log import ENGINE_LOG, JOB_LOG, Log
from rollout_wal.log.policy import SyncPolicy
from rollout_wal.log.segment import Frame
from rollout_wal.log.storage import OsStorage
from rollout_wal.testing.disk import Disk, Fault


def ignore(_: Frame) -> None:
    return


def simulated(disk: Disk, **options: object) -> Log:
    return Log.open(disk.mount(), kind=ENGINE_LOG, on_frame=ignore, segment_bytes=4096, prepare_ahead=False, **options)  # type: ignore[arg-type]


def on_disk(path: Path, **options: object) -> Log:
    return Log.open(path, kind=ENGINE_LOG, on_frame=ignore, segment_bytes=1 << 16, **options)  # type: ignore[arg-type]


def payloads(path: Path) -> list[bytes]:
    out: list[bytes] = []
    Log.open(path, kind=ENGINE_LOG, on_frame=lambda f: out.append(bytes(f.payload)), segment_bytes=1 << 16).close()
    return out


def test_append_returns_at_once_and_nothing_is_durable_before_the_wait() -> None:
    disk = Disk()
    log = simulated(disk)
    before = disk.operations
    lsn = log.append(1, b"x")
    assert (lsn, log.durable_lsn, disk.operations) == (1, 0, before)
    assert log.wait_durable(lsn) == 1
    assert disk.operations > before


def test_one_sync_serves_everything_that_is_pending() -> None:
    log = simulated(Disk())
    log.append(1, b"x")
    log.wait_durable()
    syncs = log.writer.syncs
    for _ in range(10):
        log.append(1, b"x")
    log.wait_durable(5)
    assert (log.durable_lsn, log.writer.syncs) == (11, syncs + 1)


@pytest.mark.parametrize("kind", ["step", "group", "none"])
def test_many_threads_wait_for_their_own_records(tmp_path: Path, kind: str) -> None:
    log = on_disk(tmp_path, policy=SyncPolicy(kind, group_ms=1.0))  # type: ignore[arg-type]
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(30):
            lsn = log.append(1, bytes([number, i]) * 50)
            if log.wait_durable(lsn) < lsn:
                wrong.append(lsn)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    log.close()
    got = payloads(tmp_path)
    assert (wrong, len(got)) == ([], 240)
    for number in range(8):  # each thread's records in its own order
        assert [p[1] for p in got if p[0] == number] == list(range(30))


def test_a_group_waits_for_company_but_not_for_ever(tmp_path: Path) -> None:
    log = on_disk(tmp_path, policy=SyncPolicy("group", group_ms=40.0, group_bytes=1 << 20))
    log.append(1, b"x")
    syncs = log.writer.syncs
    threads = [threading.Thread(target=lambda: log.wait_durable(log.append(1, b"y"))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert log.durable_lsn == 5
    assert log.writer.syncs - syncs <= 2
    log.close()


def test_awaitable_twin(tmp_path: Path) -> None:
    log = on_disk(tmp_path)

    async def main() -> list[int]:
        waits = [log.wait_durable_async(log.append(1, bytes([i]))) for i in range(20)]
        cancelled = asyncio.ensure_future(log.wait_durable_async(log.append(1, b"z")))
        cancelled.cancel()
        return await asyncio.gather(*waits)

    got = asyncio.run(main())
    assert all(durable >= lsn for lsn, durable in zip(range(1, 21), got))
    with pytest.raises(BadInput, match="never appended"):
        asyncio.run(log.wait_durable_async(99))
    log.close()


def test_waiting_for_what_was_never_appended_is_refused() -> None:
    log = simulated(Disk())
    with pytest.raises(BadInput, match="LSN 7 was never appended"):
        log.wait_durable(7)


@pytest.mark.parametrize(("kind", "flags"), [(256, 0), (-1, 0), (1, 1 << 16)])
def test_what_no_frame_can_hold_is_refused_and_nothing_is_half_there(kind: int, flags: int) -> None:
    log = simulated(Disk())
    with pytest.raises(BadInput, match="does not fit"):
        log.append(kind, b"x", flags)
    assert log.append(1, b"x") == 1
    assert log.wait_durable() == 1


@pytest.mark.parametrize("operation", ["pwrite", "sync", "sync_dir", "rename", "create"])
def test_an_error_poisons_for_good_and_no_sync_is_retried(operation: str) -> None:
    disk = Disk()
    log = simulated(disk)
    log.append(1, b"before")
    log.wait_durable()
    log.append(1, b"x" * 5000)  # a rotation, so that every operation occurs
    disk.arm([Fault(operation, 0)])
    with pytest.raises(LogPoisoned, match="Everything up to LSN 1 is safe"):
        log.wait_durable()
    after = len(disk.log)
    for attempt in (lambda: log.append(1, b"x"), lambda: log.wait_durable(2), lambda: log.wait_durable(1)):
        with pytest.raises(LogPoisoned):
            attempt()
    with pytest.raises(LogPoisoned):
        asyncio.run(log.wait_durable_async(2))
    log.close()
    assert [op for op in disk.log[after:] if op.startswith(("sync", "pwrite"))] == []


def test_every_waiter_hears_of_the_poison() -> None:
    disk = Disk()
    log = simulated(disk)
    log.append(1, b"x")
    log.wait_durable()
    entered, release = threading.Event(), threading.Event()

    def before(operation: str, name: str) -> None:
        if operation == "sync":
            entered.set()
            assert release.wait(10)

    disk.before = before
    disk.arm([Fault("sync", 0)])
    log.append(1, b"y")
    heard: list[type] = []

    def wait() -> None:
        try:
            log.wait_durable(2)
        except Exception as error:
            heard.append(type(error))

    async def wait_async() -> None:
        try:
            await log.wait_durable_async(2)
        except Exception as error:
            heard.append(type(error))

    threads = [threading.Thread(target=wait) for _ in range(5)]
    threads += [threading.Thread(target=lambda: asyncio.run(wait_async())) for _ in range(3)]
    for t in threads:
        t.start()
    assert entered.wait(10)
    time.sleep(0.05)
    release.set()
    for t in threads:
        t.join(10)
    assert heard == [LogPoisoned] * 8


def test_a_future_of_a_closed_event_loop_hurts_nobody() -> None:
    log = simulated(Disk())
    log.append(1, b"x")
    log.writer.sync_soon = lambda: None  # type: ignore[method-assign]
    loop = asyncio.new_event_loop()
    task = loop.create_task(log.wait_durable_async(1))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert log.wait_durable() == 1


def test_whoever_waits_for_what_is_let_go_of_is_told() -> None:
    """As when Ctrl-C meets `close` while it waits: what is pending is never written, and no coroutine waits for it."""
    log = simulated(Disk())
    log.append(1, b"x")
    log.writer.sync_soon = lambda: None  # type: ignore[method-assign]

    async def wait() -> None:
        waiting = asyncio.create_task(log.wait_durable_async(1))
        await asyncio.sleep(0)
        log.writer.abandon()
        with pytest.raises(LogPoisoned, match="was closed"):
            await asyncio.wait_for(waiting, 10)

    asyncio.run(wait())


def test_how_long_syncs_took_is_counted() -> None:
    log = simulated(Disk())
    for i in range(3):
        log.append(1, bytes([i]))
        log.wait_durable()
    buckets = log.writer.sync_s.buckets()
    assert buckets[-1] == ("+Inf", float(log.writer.syncs))
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert log.writer.sync_s.total > 0


def test_poison_survives_on_disk_as_nothing_lost() -> None:
    disk = Disk(3)
    log = simulated(disk)
    for i in range(5):
        log.append(1, bytes([i]))
        log.wait_durable()
    log.append(1, b"pending")
    disk.arm([Fault("sync", 0)])
    with pytest.raises(LogPoisoned):
        log.wait_durable()
    disk.kill()
    seen: list[bytes] = []
    again = Log.open(disk.mount(), kind=ENGINE_LOG, on_frame=lambda f: seen.append(bytes(f.payload)))
    assert seen[:5] == [bytes([i]) for i in range(5)]
    assert again.durable_lsn == len(seen)


def test_an_interrupted_leader_poisons_and_lets_the_others_go() -> None:
    disk = Disk()
    log = simulated(disk)
    log.append(1, b"x")
    log.wait_durable()

    def interrupt(operation: str, name: str) -> None:
        raise KeyboardInterrupt

    disk.before = interrupt
    log.append(1, b"y")
    with pytest.raises(KeyboardInterrupt):
        log.wait_durable()
    disk.before = None
    with pytest.raises(LogPoisoned, match="an interruption: KeyboardInterrupt"):
        log.wait_durable()
    with pytest.raises(LogPoisoned):
        log.append(1, b"z")
    log.close()


def test_a_failing_on_durable_is_not_swallowed(tmp_path: Path) -> None:
    def fail(lsn: int) -> None:
        raise RuntimeError("whoever follows durability is broken")

    log = on_disk(tmp_path, on_durable=fail)
    log.append(1, b"x")
    log.sync_soon()
    deadline = time.monotonic() + 10
    while log.writer.poisoned is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(LogPoisoned, match="RuntimeError"):
        log.append(1, b"y")
    log.close()
    assert payloads(tmp_path) == [b"x"]


def test_close_syncs_what_is_pending_and_refuses_the_rest(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    log.append(1, b"x")
    log.close()
    log.close()
    with pytest.raises(LogPoisoned, match="was closed"):
        log.append(1, b"y")
    assert log.wait_durable(1) == 1
    assert payloads(tmp_path) == [b"x"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("tmp-", "spare-"))]


def test_close_waits_for_the_leader_of_another_thread(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    for _ in range(50):
        log.append(1, b"x" * 3000)
        log.sync_soon()
    log.close()
    assert len(payloads(tmp_path)) == 50


def test_records_larger_than_a_segment_and_large_segments(tmp_path: Path) -> None:
    sizes = [10, 1 << 16, 5 << 20, 3, (1 << 16) - 168, 9 << 20, 0]
    log = on_disk(tmp_path)
    for size in sizes:
        log.append(1, b"\xa5" * size)
    log.wait_durable()
    log.close()
    assert [len(p) for p in payloads(tmp_path)] == sizes


def test_a_log_of_many_read_windows(tmp_path: Path) -> None:
    """Records straddle the windows of the reader, and the segments end in zeros."""
    log = Log.open(tmp_path, kind=ENGINE_LOG, on_frame=ignore, segment_bytes=9 << 20)
    for i in range(2600):
        log.append(1, i.to_bytes(4, "little") + bytes(9000 + i % 17))
    log.close()
    got = [int.from_bytes(p[:4], "little") for p in payloads(tmp_path)]
    assert got == list(range(2600))


def test_rotate_starts_a_new_segment_with_the_next_append() -> None:
    disk = Disk()
    log = simulated(disk)
    log.append(1, b"x")
    log.wait_durable()
    sequence = log.writer.rotate()
    assert log.writer.rotate() == sequence
    log.append(1, b"y")
    log.wait_durable()
    assert log.writer.segment.sequence == sequence
    assert len(log.segments()) == 2
    assert [f.lsn for f in log.read()] == [1, 2]


def test_drop_before_will_not_drop_the_whole_log() -> None:
    log = simulated(Disk())
    log.append(1, b"x")
    log.wait_durable()
    with pytest.raises(BadInput, match="not there yet"):
        log.drop_before(log.writer.rotate())
    assert len(log.segments()) == 1


def test_an_error_while_cleaning_poisons() -> None:
    disk = Disk()
    log = simulated(disk)
    log.append(1, b"x")
    log.wait_durable()
    sequence = log.writer.rotate()
    log.append(1, b"y")
    log.wait_durable()
    disk.arm([Fault("sync", 0)])
    with pytest.raises(LogPoisoned):
        log.drop_before(sequence)
    with pytest.raises(LogPoisoned):
        log.append(1, b"z")
    assert len(log.segments()) == 2


def test_a_fenced_owner_is_refused_after_its_sync_and_before_its_acknowledgement() -> None:
    disk = Disk()
    stale = simulated(disk)
    stale.append(1, b"x")
    stale.wait_durable()
    owner = simulated(disk)
    stale.append(1, b"y")
    with pytest.raises(LogFenced, match="epoch 2 or later; this writer holds 1"):
        stale.wait_durable()
    assert stale.durable_lsn == 1
    with pytest.raises(LogFenced):
        stale.append(1, b"z")
    stale.close()
    owner.append(1, b"w")
    owner.wait_durable()
    assert [bytes(f.payload) for f in owner.read()] == [b"x", b"w"]


def test_an_owner_that_is_fenced_while_it_recovers_does_not_come_up() -> None:
    disk = Disk()
    first = simulated(disk)
    first.append(1, b"x")
    first.wait_durable()
    later: list[Log] = []

    def overtake(operation: str, name: str) -> None:
        if operation == "create" and name.startswith("durable-"):
            disk.before = None
            later.append(simulated(disk))

    disk.before = overtake
    with pytest.raises(LogFenced):
        simulated(disk)
    later[0].append(1, b"y")
    assert later[0].wait_durable() == 2


def test_a_stale_owner_cannot_lower_the_low_water_mark_of_its_successor() -> None:
    disk = Disk()
    stale = simulated(disk)

    def checkpoint(log: Log) -> int:
        sequence = log.writer.rotate()
        log.append(2, b"checkpoint")
        log.wait_durable()
        return sequence

    stale.append(1, b"x")
    sequence = checkpoint(stale)

    def meanwhile(operation: str, name: str) -> None:
        if operation == "pwrite" and name.startswith("lowwater"):  # the stale owner stops here, for long
            disk.before = None
            owner = simulated(disk)
            owner.append(1, b"y")
            owner.drop_before(checkpoint(owner))
            owner.close()

    disk.before = meanwhile
    stale.drop_before(sequence)
    seen: list[bytes] = []
    Log.open(disk.mount(), kind=ENGINE_LOG, on_frame=lambda f: seen.append(bytes(f.payload))).close()
    assert seen == [b"checkpoint"]


def test_a_missing_directory_is_no_open_gate(tmp_path: Path) -> None:
    log = on_disk(tmp_path / "log")
    log.append(1, b"x")
    log.wait_durable()
    (tmp_path / "log").rename(tmp_path / "elsewhere")
    log.append(1, b"y")
    with pytest.raises(LogFenced, match="is gone"):
        log.wait_durable()
    log.close()


def test_a_fence_that_cannot_be_looked_at_acknowledges_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    log.append(1, b"x")
    with monkeypatch.context() as m:
        m.setattr(os, "access", lambda *_: False)  # the directory has lost its permissions, or the mount is gone
        with pytest.raises(LogFenced, match="is gone"):
            log.wait_durable()
    log.close()


def test_the_polite_lock_tells_a_second_process_at_once(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    with pytest.raises(LogOwned, match=f"in use by pid {os.getpid()}"):
        on_disk(tmp_path)
    log.append(1, b"x")
    assert log.wait_durable() == 1
    log.close()
    on_disk(tmp_path).close()


def test_a_taker_is_protected_by_the_polite_lock_too(tmp_path: Path) -> None:
    stale = on_disk(tmp_path)
    owner = on_disk(tmp_path, take_over=True)
    with pytest.raises(LogOwned):
        on_disk(tmp_path)
    stale.close()
    with pytest.raises(LogOwned):
        on_disk(tmp_path)
    owner.append(1, b"x")
    assert owner.wait_durable() == 1
    owner.close()


def test_the_wrong_kind_is_refused_and_nobody_is_fenced(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    log.append(1, b"x")
    log.wait_durable()
    with pytest.raises(LogDamaged, match="holds a log of kind 2, not 1"):
        Log.open(OsStorage(tmp_path), kind=JOB_LOG, on_frame=ignore)
    log.append(1, b"y")
    assert log.wait_durable() == 2
    log.close()


def in_child(function: object) -> int:
    """Exit status of a forked child that runs a function."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function())  # type: ignore[operator]
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    log.append(1, b"x")

    def child() -> int:
        refused = 0
        for attempt in (lambda: log.append(1, b"child"), log.wait_durable):
            try:
                attempt()
            except LogPoisoned as error:
                refused += f"belongs to process {os.getppid()}" in str(error)
        log.close()
        return refused

    assert in_child(child) == 2
    log.append(1, b"y")
    log.close()
    assert payloads(tmp_path) == [b"x", b"y"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_that_lives_on_does_not_hold_the_lock(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # lives on until the parent closes its end
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    log.close()
    on_disk(tmp_path).close()
    os.close(write)
    os.waitpid(pid, 0)


def test_the_spare_segment_is_used_and_swept(tmp_path: Path) -> None:
    log = on_disk(tmp_path)
    for _ in range(30):
        log.append(1, b"x" * 9000)
        log.wait_durable()
    log.close()
    assert len(payloads(tmp_path)) == 30
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("tmp-", "spare-"))]


def test_debris_of_earlier_owners_is_swept_and_that_of_later_ones_is_not() -> None:
    disk = Disk()
    simulated(disk).close()
    storage = disk.mount()
    for name in (
        "tmp-0000000001-000000000001.seg",
        "spare-0000000001-000000000002.seg",
        "tmp-0000000009-000000000001.seg",
    ):
        storage.create(name)
    storage.create("a file of somebody else")
    simulated(disk).close()
    left = [n for n in disk.names if n.startswith(("tmp-", "spare-", "a file"))]
    assert sorted(left) == ["a file of somebody else", "tmp-0000000009-000000000001.seg"]
