"""The decision table of recovery: every combination of conditions meets exactly one case."""

from __future__ import annotations

import itertools
import struct

import pytest
from crc32c import crc32c

from rollout_wal.errors import LogDamaged, LogTooNew
from rollout_wal.log.format import CRC, FRAME, FRAME_HEADER_BYTES, SEGMENT_HEADER_BYTES
from rollout_wal.log.log import ENGINE_LOG, Log
from rollout_wal.log.recovery import Case, Recovery, decide
from rollout_wal.log.segment import Found
from rollout_wal.testing.disk import Disk

ANY = (False, True)

#: found, inner, at the cut, claimed -> case. Written out from the documentation, not from the code.
ROWS: list[tuple[Found, tuple[bool, ...], tuple[bool, ...], tuple[bool, ...], Case]] = [
    (Found.NEXT, ANY, ANY, ANY, Case.ACCEPT),
    (Found.NEWER, ANY, ANY, ANY, Case.TOO_NEW),
    (Found.END, (True,), (True,), ANY, Case.NEXT_SEGMENT),
    (Found.END, (True,), (False,), ANY, Case.DAMAGED),
    (Found.END, (False,), ANY, (True,), Case.DAMAGED),
    (Found.END, (False,), ANY, (False,), Case.CLEAN_END),
    (Found.ZERO, (True,), ANY, ANY, Case.DAMAGED),
    (Found.ZERO, (False,), ANY, (True,), Case.DAMAGED),
    (Found.ZERO, (False,), ANY, (False,), Case.CLEAN_END),
    (Found.INVALID, (True,), ANY, ANY, Case.DAMAGED),
    (Found.INVALID, (False,), ANY, (True,), Case.DAMAGED),
    (Found.INVALID, (False,), ANY, (False,), Case.TORN_TAIL),
    (Found.STALE, (True,), ANY, ANY, Case.DAMAGED),
    (Found.STALE, (False,), ANY, (True,), Case.DAMAGED),
    (Found.STALE, (False,), ANY, (False,), Case.STALE_TAIL),
    (Found.ORDER, (True,), ANY, ANY, Case.DAMAGED),
    (Found.ORDER, (False,), ANY, (True,), Case.DAMAGED),
    (Found.ORDER, (False,), ANY, (False,), Case.LOST_FRAME),
]


@pytest.mark.parametrize(("found", "inner", "at_cut", "claimed"), list(itertools.product(Found, ANY, ANY, ANY)))
def test_every_combination_meets_exactly_one_case(found: Found, inner: bool, at_cut: bool, claimed: bool) -> None:
    rows = [row for row in ROWS if row[0] is found and inner in row[1] and at_cut in row[2] and claimed in row[3]]
    assert len(rows) == 1
    assert decide(found, inner=inner, at_cut=at_cut, claimed=claimed) is rows[0][4]


def test_every_case_occurs() -> None:
    assert {row[4] for row in ROWS} == set(Case)


# -- each case on real bytes ------------------------------------------------------------------------------------------


def write(disk: Disk, groups: int = 3, segment_bytes: int = 1024, pending: int = 0) -> None:
    """Groups of two records of 40 bytes, 80 bytes in all each; then pending ones that no sync covers."""
    log = Log.open(
        disk.mount(), kind=ENGINE_LOG, on_frame=lambda f: None, segment_bytes=segment_bytes, prepare_ahead=False
    )
    for group in range(groups):
        for _ in range(2):
            log.append(7, bytes([group]) * 40)
        log.wait_durable()
    if pending:
        for i in range(pending):
            log.append(8, bytes([i]) * 40)
        writer = log.writer
        batches, _ = writer._take()
        assert writer._active.file is not None
        for batch in batches:
            writer._active.file.pwrite(b"".join(batch.parts), batch.offset)


def recover(disk: Disk) -> tuple[Recovery, list[int]]:
    recovery = Recovery(disk.mount())
    lsns = [frame.lsn for frame in recovery.frames()]
    recovery.close()
    return recovery, lsns


def last_segment(disk: Disk) -> str:
    return max(name for name in disk.names if name.endswith(".seg"))


def forget_marks(disk: Disk) -> None:
    for name in [n for n in disk.names if n.startswith("durable-")]:
        del disk.names[name]


def at(lsn: int) -> int:
    return SEGMENT_HEADER_BYTES + (lsn - 1) * 80


def test_clean_end() -> None:
    disk = Disk()
    write(disk)
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.CLEAN_END, [1, 2, 3, 4, 5, 6])
    assert recovery.ending.tail == []


def test_clean_end_keeps_intact_records_that_nothing_claims_as_the_tail() -> None:
    disk = Disk()
    write(disk, pending=2)
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.CLEAN_END, list(range(1, 9)))
    assert [entry[0] for entry in recovery.ending.tail] == [7, 8]


def test_zeros_where_a_durable_record_was_are_damage() -> None:
    disk = Disk()
    write(disk)
    disk.corrupt(last_segment(disk), at(6), bytes(80))
    with pytest.raises(LogDamaged, match=rf"offset {at(6)} \(LSN 6\).*repair"):
        recover(disk)


def test_a_torn_tail_is_dropped_with_what_follows_it() -> None:
    disk = Disk()
    write(disk, pending=3)
    disk.corrupt(last_segment(disk), at(8) + 50, b"?")
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.TORN_TAIL, list(range(1, 8)))


def test_a_bad_record_that_a_later_one_claims_is_damage_even_without_the_mark() -> None:
    disk = Disk()
    write(disk)
    forget_marks(disk)
    disk.corrupt(last_segment(disk), at(2) + 50, b"?")
    with pytest.raises(LogDamaged, match=r"no intact frame.*durable record"):
        recover(disk)


def test_a_bad_last_record_is_damage_if_the_mark_claims_it_and_a_torn_tail_if_nothing_does() -> None:
    disk = Disk()
    write(disk)
    disk.corrupt(last_segment(disk), at(6) + 50, b"?")
    with pytest.raises(LogDamaged):
        recover(disk)
    forget_marks(disk)
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.TORN_TAIL, [1, 2, 3, 4, 5])


def rewrite_frame(disk: Disk, number: int, /, **changes: int) -> None:
    """Change header fields of a frame, with a right CRC."""
    name = last_segment(disk)
    file = disk.mount().open(name)
    raw = bytearray(file.pread(80, at(number)))
    fields = list(FRAME.unpack_from(raw))
    for key, value in changes.items():
        fields[{"version": 1, "generation": 5, "lsn": 6, "durable": 7, "epoch": 8}[key]] = value
    FRAME.pack_into(raw, 0, *fields)
    CRC.pack_into(raw, FRAME_HEADER_BYTES - 4, crc32c(bytes(raw[40:]), crc32c(bytes(raw[:36]))))
    disk.corrupt(name, at(number), bytes(raw))


@pytest.mark.parametrize("field", ["generation", "epoch"])
def test_a_stale_frame_behind_the_end_is_dropped(field: str) -> None:
    disk = Disk()
    write(disk, pending=2)
    rewrite_frame(disk, 8, **{field: 77})
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.STALE_TAIL, list(range(1, 8)))


def test_a_stale_frame_where_a_durable_record_was_is_damage() -> None:
    disk = Disk()
    write(disk)
    rewrite_frame(disk, 3, generation=77)
    with pytest.raises(LogDamaged, match="another segment or epoch"):
        recover(disk)


def test_a_lost_frame_ends_the_log() -> None:
    disk = Disk()
    write(disk, pending=3)
    rewrite_frame(disk, 8, lsn=9)
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.LOST_FRAME, list(range(1, 8)))


def test_a_newer_frame_is_refused_and_not_dropped() -> None:
    disk = Disk()
    write(disk, pending=2)
    rewrite_frame(disk, 8, version=2)
    with pytest.raises(LogTooNew, match="newer log format"):
        recover(disk)


def test_a_newer_segment_is_refused() -> None:
    disk = Disk()
    write(disk)
    name = last_segment(disk)
    raw = bytearray(disk.mount().open(name).pread(SEGMENT_HEADER_BYTES, 0))
    struct.pack_into("<H", raw, 8, 2)
    CRC.pack_into(raw, SEGMENT_HEADER_BYTES - 4, crc32c(bytes(raw[:-4])))
    disk.corrupt(name, 0, bytes(raw))
    with pytest.raises(LogTooNew):
        recover(disk)


def test_a_payload_that_looks_like_a_frame_claims_nothing() -> None:
    prefix = struct.pack("<IBBHIIQQI", 0x46574C52, 1, 7, 0, 0, 1, 5, 1 << 40, 1)
    forged = prefix + CRC.pack(crc32c(prefix))
    disk = Disk()
    log = Log.open(disk.mount(), kind=ENGINE_LOG, on_frame=lambda f: None, segment_bytes=1024, prepare_ahead=False)
    log.append(7, b"a" * 40)
    log.wait_durable()
    log.append(7, b"b" * 40)
    log.append(7, forged)
    batches, _ = log.writer._take()
    assert log.writer._active.file is not None
    log.writer._active.file.pwrite(b"".join(batches[0].parts), batches[0].offset)
    disk.corrupt(last_segment(disk), at(2) + 50, b"?")
    recovery, lsns = recover(disk)
    assert (recovery.ending.case, lsns) == (Case.TORN_TAIL, [1])
