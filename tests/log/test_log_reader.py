"""Readers in other processes: no lock, nothing past what is durable, whatever the owner does meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rollout_wal.errors import LogDamaged
from rollout_wal.log.log import ENGINE_LOG, Log
from rollout_wal.log.reader import LogReader
from rollout_wal.log.storage import OsStorage
from rollout_wal.testing.disk import Disk


def open_log(disk: Disk) -> Log:
    return Log.open(disk.mount(), kind=ENGINE_LOG, on_frame=lambda f: None, segment_bytes=512, prepare_ahead=False)


def read(reader: LogReader) -> list[bytes]:
    return [bytes(frame.payload) for frame in reader.read()]


def test_only_what_is_durable_is_shown() -> None:
    disk = Disk()
    log = open_log(disk)
    reader = LogReader(disk.mount())
    assert read(reader) == []
    log.append(1, b"a")
    assert read(reader) == []
    batches, _ = log.writer._take()  # written, and neither synced nor published
    log.writer._active.open(batches[1].segment, batches[1].size)  # type: ignore[arg-type]
    log.writer._active.file.pwrite(b"".join(batches[1].parts), batches[1].offset)  # type: ignore[union-attr]
    assert read(reader) == []


def test_each_call_goes_on_where_the_last_one_stopped() -> None:
    disk = Disk()
    log = open_log(disk)
    reader = LogReader(disk.mount())
    for group in range(12):
        for i in range(3):
            log.append(1, bytes([group, i]) * 30)
        log.wait_durable()
        if group % 2:
            assert [p[:2] for p in read(reader)] == [bytes([g, i]) for g in (group - 1, group) for i in range(3)]
    assert read(reader) == []
    first = next(LogReader(disk.mount()).read())
    assert first.lsn == 1


def test_stopping_early_loses_nothing() -> None:
    disk = Disk()
    log = open_log(disk)
    for i in range(20):
        log.append(1, bytes([i]) * 50)
    log.wait_durable()
    reader = LogReader(disk.mount())
    got = []
    while True:
        frame = next(reader.read(), None)
        if frame is None:
            break
        got.append(frame.payload[0])
    assert got == list(range(20))


def test_a_reader_follows_a_takeover_and_never_sees_what_was_not_acknowledged() -> None:
    disk = Disk()
    stale = open_log(disk)
    reader = LogReader(disk.mount())
    stale.append(1, b"a")
    stale.wait_durable()
    stale.append(1, b"never acknowledged")
    owner = open_log(disk)
    assert read(reader) == [b"a"]
    owner.append(1, b"b")
    owner.wait_durable()
    assert read(reader) == [b"b"]


def test_a_recovered_tail_is_shown_without_waiting_for_the_next_append() -> None:
    disk = Disk()
    log = open_log(disk)
    log.append(1, b"a")
    log.wait_durable()
    log.append(1, b"tail")
    batches, _ = log.writer._take()
    log.writer._active.file.pwrite(b"".join(batches[0].parts), batches[0].offset)  # type: ignore[union-attr]
    reader = LogReader(disk.mount())
    assert read(reader) == [b"a"]
    assert open_log(disk).durable_lsn == 2
    assert read(reader) == [b"tail"]


def test_a_reader_survives_cleaning_under_its_feet() -> None:
    disk = Disk()
    log = open_log(disk)
    gaps = []
    reader = LogReader(disk.mount(), on_gap=lambda: gaps.append(reader.next_lsn))
    for i in range(9):
        log.append(1, bytes([i]) * 100)
    log.wait_durable()
    frames = reader.read()
    assert next(frames).payload[0] == 0
    sequence = log.writer.rotate()
    log.append(2, b"checkpoint")
    log.wait_durable()
    log.drop_before(sequence)
    rest = [f.payload[0] for f in frames]  # its files are open: what it had begun it can finish
    assert rest == list(range(1, 9))
    assert (read(reader), gaps) == ([b"checkpoint"], [])
    late = LogReader(disk.mount(), on_gap=lambda: gaps.append(late.next_lsn))
    assert (read(late), gaps) == ([b"checkpoint"], [10])


def test_damage_below_the_durable_mark_is_said_with_its_place() -> None:
    disk = Disk()
    log = open_log(disk)
    log.append(1, b"a" * 100)
    log.append(1, b"b" * 100)
    log.wait_durable()
    disk.corrupt("0000000001-000000000001.seg", 128 + 144 + 60, b"?")
    reader = LogReader(disk.mount())
    with pytest.raises(LogDamaged, match=r"offset 272, where LSN 2 should be"):
        read(reader)


def test_readers_beside_a_busy_writer(tmp_path: Path) -> None:
    """Rotation, cleaning and appends at full speed, and two readers that must see every durable record once."""
    log = Log.open(tmp_path, kind=ENGINE_LOG, on_frame=lambda f: None, segment_bytes=1 << 14)
    done = threading.Event()
    seen: list[list[int]] = [[], []]
    errors: list[BaseException] = []

    def follow(index: int) -> None:
        reader = LogReader(OsStorage(tmp_path, create=False), on_gap=seen[index].clear)
        try:
            while True:
                last = done.is_set()
                seen[index] += [f.lsn for f in reader.read()]
                if last:
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for i in range(1, 1200):
        log.append(1, b"x" * 200)
        if i % 10 == 0:
            log.wait_durable()
        if i % 400 == 0:
            sequence = log.writer.rotate()
            log.append(2, b"checkpoint")
            log.wait_durable()
            log.drop_before(sequence)
    log.wait_durable()
    last = log.durable_lsn
    done.set()
    for t in threads:
        t.join(30)
    log.close()
    assert errors == []
    for lsns in seen:
        assert lsns == list(range(lsns[0], last + 1))
