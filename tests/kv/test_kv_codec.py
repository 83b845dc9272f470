"""Every bit comes back: all float formats, all layouts, both codecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_wal.errors import KvError
from rollout_wal.kv import Codec, KvLayout, KvStore
from rollout_wal.kv.codec import decode, encode
from rollout_wal.kv.layout import DTYPE_BYTES, empty_arrays, pack_tokens, unpack_tokens


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("codec", list(Codec))
def test_every_bit_pattern_comes_back(dtype: str, codec: Codec) -> None:
    """All 8- and 16-bit patterns; of 32 bits every exponent and sign, infinities, NaN payloads, subnormals."""
    size = DTYPE_BYTES[dtype]
    if size == 4:
        high = np.arange(1 << 16, dtype=np.uint32) << 16
        bits = np.concatenate((high, high | 1, high | 0xFFFF))
    else:
        bits = np.arange(256**size, dtype={1: np.uint8, 2: np.uint16}[size])
    raw = bits.view(np.uint8)
    back = decode(encode(raw, codec, size), codec, size, raw.nbytes)
    assert back.tobytes() == raw.tobytes()


@given(data=st.binary(max_size=400), size=st.sampled_from([1, 2, 4]))
def test_any_bytes_come_back(data: bytes, size: int) -> None:
    raw = np.frombuffer(data[: len(data) // size * size], np.uint8)
    assert decode(encode(raw, Codec.PLANES, size), Codec.PLANES, size, raw.nbytes).tobytes() == raw.tobytes()


def test_values_like_those_of_a_model_shrink() -> None:
    values = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    assert bf16.nbytes / encode(bf16, Codec.PLANES, 2).nbytes > 1.3
    assert values.nbytes / encode(values.view(np.uint8), Codec.PLANES, 4).nbytes > 1.1


@given(data=st.data())
def test_damaged_codes_are_refused_or_the_same_size(data: st.DataObject) -> None:
    """Never more than was asked for, and never an error that nobody expects."""
    raw = np.repeat(np.arange(64, dtype=np.uint8), 8)
    stored = bytearray(encode(raw, Codec.PLANES, 2))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(stored), len(stored) - 1, at]))
    try:
        back = decode(memoryview(stored)[:cut], Codec.PLANES, 2, raw.nbytes)
    except KvError:
        return
    assert back.nbytes == raw.nbytes


def test_layouts_describe_themselves(layout: KvLayout) -> None:
    assert KvLayout.parse(layout.describe()) == layout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": [{"kind": "hyena", "order": 2}]}, "hyena"),
        ({"dtype": "float4"}, "float4"),
        ({"layers": [{"kind": "attention", "kv_heads": 2}]}, "key_dim"),
        ({"layers": None}, "TypeError"),
    ],
)
def test_an_unknown_layout_is_named(gqa: KvLayout, change: Any, named: str) -> None:
    with pytest.raises(KvError, match=named):
        KvLayout.parse({**gqa.describe(), **change})


def test_blocks_are_the_tokens_of_every_part(layout: KvLayout, make_arrays: Any) -> None:
    arrays = make_arrays(layout, 100)
    raw = np.empty(40 * layout.token_bytes, np.uint8)
    pack_tokens(arrays, 30, 70, raw)
    back = empty_arrays(layout, arrays.token_T)
    unpack_tokens(raw, back, 30, 70)
    for a, b in zip(arrays.parts, back.parts, strict=True):
        np.testing.assert_array_equal(a[:, 30:70], b[:, 30:70])


@pytest.mark.parametrize("codec", ["raw", "planes"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
def test_every_layout_is_saved_and_loaded(
    tmp_path: Any, layout: KvLayout, codec: str, tokens: int, make_arrays: Any, chain: Any, runs: Any
) -> None:
    arrays = make_arrays(layout, tokens)
    with KvStore(tmp_path / "kv", codec=codec) as store:
        assert store.save("1", arrays, chain(layout), runs(tokens)) == tokens
        assert store.load(arrays.token_T, chain(layout), runs(tokens)).tokens == 0  # prepared only
        (saved,) = store.commit()
        assert saved.tokens == tokens
        more = np.concatenate((arrays.token_T, [1, 2, 3])).astype(np.int32)
        loaded = store.load(more, chain(layout), runs(len(more)))
    assert loaded.tokens == tokens
    assert loaded.arrays is not None
    for a, b in zip((*arrays.parts, *arrays.states), (*loaded.arrays.parts, *loaded.arrays.states), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_the_codec_of_a_record_goes_with_the_record(
    tmp_path: Any, gqa: KvLayout, codec: str, make_arrays: Any, chain: Any, runs: Any
) -> None:
    arrays = make_arrays(gqa, 20)
    with KvStore(tmp_path / "kv", codec=codec) as store:
        store.save("1", arrays, chain(gqa), runs(20))
        store.commit()
    with KvStore(tmp_path / "kv", codec="planes" if codec == "raw" else "raw") as store:
        assert store.load(arrays.token_T, chain(gqa), runs(20)).tokens == 20


def test_auto_measures_once_and_remembers(tmp_path: Any) -> None:
    with KvStore(tmp_path / "kv") as store:
        first = store.choice
    with KvStore(tmp_path / "kv") as store:
        assert store.choice == first
        assert first is not None
        assert store.codec is first.codec
