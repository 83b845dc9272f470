"""Records: what goes in comes out, newer writers are understood, and no input does harm."""

from __future__ import annotations

from dataclasses import fields, replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_wal import records
from rollout_wal.engines.base import FinishReason
from rollout_wal.errors import BadInput, LogCorruptInput
from rollout_wal.records import Begin, Carry, Finish, Record, RecordType

CLASSES = [
    cls for cls in vars(records).values() if isinstance(cls, type) and issubclass(cls, Record) and cls is not Record
]
VALUES = {"int": st.integers(-1, 2**31), "str": st.text(max_size=20), "bytes": st.binary(max_size=30)}
PLAIN = st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5) | st.none(), max_size=4)


def instances(cls: type[Record]) -> st.SearchStrategy[Record]:
    def value(name: str, kind: str) -> st.SearchStrategy[object]:
        if name in cls.ARRAYS:
            return st.lists(st.integers(0, 100), max_size=5).map(lambda v: np.asarray(v, cls.ARRAYS[name]))
        return VALUES.get(kind, PLAIN)

    return st.builds(cls, **{f.name: value(f.name, str(f.type)) for f in fields(cls)})


def test_every_record_type_has_a_number_of_its_own() -> None:
    numbers = [int(cls.TYPE) for cls in CLASSES]
    assert len(numbers) == len(set(numbers))
    assert set(RecordType) - {cls.TYPE for cls in CLASSES} == {RecordType.STEP, RecordType.COLUMN}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_round_trip(cls: type[Record]) -> None:
    @settings(max_examples=15, deadline=None)
    @given(instances(cls))
    def check(record: Record) -> None:
        again = cls.decode(record.encode())
        for f in fields(cls):
            a, b = getattr(record, f.name), getattr(again, f.name)
            assert np.array_equal(a, b) if f.name in cls.ARRAYS else a == b, f.name

    check()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_no_input_breaks_a_decoder(cls: type[Record]) -> None:
    junk = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats()
        | st.text(max_size=4)
        | st.binary(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=12,
    )

    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=60) | st.lists(junk, max_size=12).map(msgpack.packb))
    def check(payload: bytes) -> None:
        try:
            record = cls.decode(payload)
        except LogCorruptInput:
            return
        for name, kind in (("int", int), ("str", str)):
            assert all(type(getattr(record, f.name)) is kind for f in fields(cls) if str(f.type) == name)

    check()


WRONG = {
    "int": [1.0, True, None, "1", np.int64(1), 1 << 64],
    "str": [None, 1, b"x", "\ud800"],
    "bytes": [None, "x", 1],
    "dict[str, Any]": [None, [], {"a": object()}],
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_what_could_not_be_read_back_is_not_encoded(cls: type[Record]) -> None:
    @settings(max_examples=5, deadline=None)
    @given(instances(cls))
    def check(record: Record) -> None:
        for f in fields(cls):
            for wrong in WRONG.get(str(f.type), ()):
                with pytest.raises(BadInput, match=cls.__name__):
                    replace(record, **{f.name: wrong}).encode()

    check()


def test_a_member_of_an_enum_is_its_number() -> None:
    assert Finish.decode(Finish(1, 2, 3, FinishReason.EOS).encode()).reason == FinishReason.EOS


def test_a_newer_writer_may_add_fields_and_an_older_one_may_lack_those_with_defaults() -> None:
    newer = msgpack.packb([*msgpack.unpackb(Finish(1, 2, 3, 4).encode()), "new", 7])
    assert Finish.decode(newer) == Finish(1, 2, 3, 4)
    older = msgpack.packb([5, np.arange(3, dtype="<i4").tobytes(), {}, 9])
    begin = Begin.decode(older)
    assert (begin.rollout, begin.noise, begin.group, begin.metadata) == (5, "position", "", {})
    with pytest.raises(LogCorruptInput, match="Finish record"):
        Finish.decode(msgpack.packb([1, 2, 3]))


def test_a_hostile_length_allocates_no_more_than_the_input() -> None:
    import tracemalloc

    for hostile in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"):
        tracemalloc.start()
        with pytest.raises(LogCorruptInput):
            Carry.decode(hostile)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 18


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(LogCorruptInput):
        Begin.decode(b"\x91" * 100_000 + b"\x00")


def test_what_is_nested_deeper_than_any_reader_reads_is_not_encoded() -> None:
    def begin(depth: int) -> Begin:
        inner: object = 1
        for _ in range(depth - 1):
            inner = (inner,) if depth % 2 else {"": inner}
        return Begin(1, np.zeros(1, np.int32), {}, 1, metadata={"": inner})

    for depth in (1, 99, 100):
        Begin.decode(begin(depth).encode())
    for depth in (101, 1022, 1023, 100_000):
        with pytest.raises(BadInput, match="nested more than 100 deep"):
            begin(depth).encode()
