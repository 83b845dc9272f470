"""The step record: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_wal.engine_state import EngineState
from rollout_wal.errors import BadInput, LogCorruptInput, LogTooNew
from rollout_wal.log.format import MAX_PAYLOAD_BYTES, decode_segment_header, decode_slots
from rollout_wal.log.segment import Frame, SegmentScan
from rollout_wal.records import Bind, RecordType
from rollout_wal.step import DTYPES, decode_step, encode_step


def arrays(rows: int, tokens: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 1 << 16, rows).astype(np.uint16),
        rng.integers(0, 1 << 32, tokens, dtype=np.uint64).astype(np.uint32),
        rng.integers(0, 6, rows).astype(np.uint8),
        rng.normal(size=tokens).astype(np.float32),
        rng.normal(size=tokens).astype(np.float32),
    )


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), logprobs=st.integers(0, 2), counts=st.booleans(), seed=st.integers(0, 99))
def test_round_trip(rows: int, logprobs: int, counts: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 5, rows).astype(np.uint16) if counts else None
    tokens = int(count.sum()) if count is not None else rows
    slot, token, finish, first, second = arrays(rows, tokens, seed)
    named = {16: rng.normal(size=(tokens, 3)).astype(np.float16), 200: np.arange(tokens, dtype=np.int64)}
    payload = encode_step(
        slot,
        token,
        finish,
        first if logprobs else None,
        second if logprobs == 2 else None,
        count_R=count,
        named=named,
    )
    step = decode_step(payload)
    assert np.array_equal(step.slot_R, slot)
    assert np.array_equal(step.token_N, token)
    assert np.array_equal(step.finish_R, finish)
    assert (step.logprob_N is not None) == (logprobs > 0)
    assert (step.sampling_logprob_N is not None) == (logprobs == 2)
    if logprobs:
        assert np.array_equal(step.logprob_N, first)
    if logprobs == 2:
        assert np.array_equal(step.sampling_logprob_N, second)
    assert (step.count_R is None) == (count is None)
    assert np.array_equal(step.named[16].reshape(-1), named[16].reshape(-1))
    assert np.array_equal(step.named[200], named[200])


def test_sizes_are_those_that_the_module_states() -> None:
    slot, token, finish, first, second = arrays(256, 256, 1)
    assert len(encode_step(slot, token, finish, first)) == 256 * 11 + 16
    assert len(encode_step(slot, token, finish, first, second)) == 256 * 15 + 20


@pytest.mark.parametrize("which", range(5))
def test_a_wrong_dtype_or_length_is_refused_and_named(which: int) -> None:
    columns = list(arrays(4, 4, 0))
    good = columns[which]
    for bad in (good.astype(np.int64), good[:3]):
        columns[which] = bad
        with pytest.raises(BadInput, match="not logged"):
            encode_step(*columns)
    with pytest.raises(BadInput, match="column 3 of a step"):
        encode_step(*arrays(4, 4, 0), named={3: np.zeros(4, np.float32)})
    with pytest.raises(BadInput, match="dtype complex"):
        encode_step(*arrays(4, 4, 0), named={20: np.zeros(4, np.complex64)})
    with pytest.raises(BadInput, match=r"shape \(4, 256\)"):
        encode_step(*arrays(4, 4, 0), named={20: np.zeros((4, 256), np.uint8)})


def feed(payload: bytes) -> EngineState:
    state = EngineState()
    state.apply(Frame(RecordType.BIND, 0, 1, 0, 0, memoryview(Bind(3, 1, 1, 0).encode())))
    state.apply(Frame(RecordType.STEP, 0, 2, 0, 0, memoryview(payload)))
    return state.finish()


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_no_input_breaks_the_step_decoder(payload: bytes) -> None:
    for decode in (decode_step, feed):
        with contextlib.suppress(LogCorruptInput):
            decode(payload)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_damage_breaks_the_step_decoder(data: st.DataObject) -> None:
    slot, token, finish, first, second = arrays(5, 5, 0)
    payload = bytearray(encode_step(slot, token, finish, first, second, named={16: np.zeros((5, 2), np.float32)}))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    for decode in (decode_step, feed):
        with contextlib.suppress(LogCorruptInput):
            decode(bytes(payload))


def test_a_hostile_header_allocates_nothing() -> None:
    import struct
    import tracemalloc

    hostile = struct.pack("<IIBBH", 0xFFFFFFFF, 0xFFFFFFFF, 255, 1, 0) + b"\x10\x07\xff\x00" * 255
    tracemalloc.start()
    with pytest.raises(LogCorruptInput):
        decode_step(hostile)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_unknown_columns_come_back_and_all_dtypes_survive() -> None:
    slot, token, finish, first, _ = arrays(3, 3, 0)
    named = {16 + i: np.arange(3).astype(dtype) for i, dtype in enumerate(DTYPES)}
    step = decode_step(encode_step(slot, token, finish, first, named=named))
    for column_id, column in named.items():
        assert step.named[column_id].dtype == column.dtype
        assert np.array_equal(step.named[column_id], column)


class Bytes:
    """A file of some bytes that notes how much is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, 0

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        assert length <= len(self.data) + 4096, "asks for more than there is"
        self.asked += length
        return self.data[offset : offset + length]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_break_the_frame_scanner(data: st.DataObject) -> None:
    from rollout_wal.log.format import FRAME, SegmentHeader
    from rollout_wal.log.segment import later_claim

    header = SegmentHeader(2, bytes(16), 1, 1, 1)
    noise = data.draw(st.binary(max_size=300))
    if data.draw(st.booleans()):
        length = data.draw(st.integers(0, 2**32 - 1))
        noise = FRAME.pack(0x46574C52, 1, 3, 0, length, 1, 1, 0, 1, data.draw(st.integers(0, 2**32 - 1))) + noise
    file = Bytes(header.encode() + noise)
    scan = SegmentScan(file, header, limit=None, next_lsn=1)  # type: ignore[arg-type]
    assert len(list(scan)) <= len(noise) // 40
    assert scan.offset <= file.size()
    later_claim(file, header, 128, 1)  # type: ignore[arg-type]
    assert file.asked <= 64 * (len(file.data) + 4096)


@given(st.binary(max_size=5000))
def test_no_bytes_break_the_headers(data: bytes) -> None:
    assert decode_segment_header(data) is None
    assert decode_slots(data, b"RLWALDUR") is None


def test_the_limit_of_a_payload_fits_into_memory_once() -> None:
    assert MAX_PAYLOAD_BYTES <= 1 << 30


def test_unknown_record_types_are_refused_unless_they_say_that_they_may_be_skipped() -> None:
    state = EngineState()
    state.apply(Frame(99, 1, 1, 0, 0, memoryview(b"")))
    with pytest.raises(LogTooNew, match="record type 99 at LSN 2"):
        state.apply(Frame(99, 0, 2, 0, 0, memoryview(b"")))
