"""What is found, what is shared, what goes away; and what damage of every kind comes to."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_wal.errors import KvError
from rollout_wal.kv import Chain, KvArrays, KvLayout, KvStore, Run
from rollout_wal.kv.data_files import data_files
from rollout_wal.kv.format import ALIGNMENT, HEADER_BYTES, Header
from rollout_wal.kv.layout import Attention, KvMismatch

TOKENS = 21  # two whole blocks of 8 and a partial one


@pytest.fixture
def saved(store: KvStore, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any) -> Any:
    """The arrays of a snapshot named "1"."""
    arrays = make_arrays(gqa, TOKENS)
    store.save("1", arrays, chain(gqa), runs(TOKENS))
    store.commit()
    return arrays


def the_file(store: KvStore) -> Path:
    (found,) = data_files(store.path)
    return found[1]


def prefix_is_right(loaded: Any, arrays: Any) -> None:
    if loaded.tokens:
        for a, b in zip(arrays.parts, loaded.arrays.parts, strict=True):
            np.testing.assert_array_equal(a[:, : loaded.tokens], b)


@pytest.mark.parametrize(("ask", "found"), [(TOKENS, TOKENS), (TOKENS - 1, 16), (16, 16), (15, 8), (7, 0), (1, 0)])
def test_the_longest_saved_beginning_is_found(
    store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any, ask: int, found: int
) -> None:
    loaded = store.load(saved.token_T[:ask], chain(gqa), runs(ask))
    assert loaded.tokens == found
    assert loaded.reason == ("" if found == ask else "partial" if found else "missing")
    prefix_is_right(loaded, saved)


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 20])
def test_another_token_ends_what_is_found(
    store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any, at: int
) -> None:
    other = saved.token_T.copy()
    other[at] += 1
    assert store.load(other, chain(gqa), runs(TOKENS)).tokens == at // 8 * 8


@pytest.mark.parametrize(
    "other",
    [
        Chain(KvLayout("float16", (Attention(2, 16, 16),) * 2), "architecture", 8),
        Chain(KvLayout("bfloat16", (Attention(2, 16, 16),) * 3), "architecture", 8),
        Chain(KvLayout("bfloat16", (Attention(2, 16, 16),) * 2, 1, 2), "architecture", 8),
        Chain(KvLayout("bfloat16", (Attention(2, 16, 16, 24), Attention(2, 16, 16))), "architecture", 8),
        Chain(KvLayout("bfloat16", (Attention(2, 16, 16),) * 2), "another", 8),
        Chain(KvLayout("bfloat16", (Attention(2, 16, 16),) * 2), "architecture", 7),
    ],
    ids=["dtype", "layers", "rank", "window", "architecture", "block size"],
)
def test_kv_of_anything_else_is_not_found(store: KvStore, saved: Any, runs: Any, other: Chain) -> None:
    assert store.load(saved.token_T, other, runs(TOKENS)).tokens == 0


def test_kv_of_other_weights_is_not_found(store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any) -> None:
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS, version=2)).tokens == 0
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS, digest="others")).tokens == 0
    mixed = (Run(8, 1, "weights"), Run(TOKENS - 8, 2, "others"))
    assert store.load(saved.token_T, chain(gqa), mixed).tokens == 8


def test_a_group_stores_its_prompt_once(store: KvStore, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any) -> None:
    group = [make_arrays(gqa, 40 + 8, seed, shared=40) for seed in range(8)]
    for i, arrays in enumerate(group):
        store.save(str(i), arrays, chain(gqa), runs(48))
    assert len(store.commit()) == 8
    assert store.metrics.bytes_raw == (40 + 8 * 8) * gqa.token_bytes
    for arrays in group:
        loaded = store.load(arrays.token_T, chain(gqa), runs(48))
        assert loaded.tokens == 48
        prefix_is_right(loaded, arrays)
    # The prompt lives as long as anybody of the group.
    store.gc(lambda manifest: manifest.name == "3")
    assert store.load(group[3].token_T, chain(gqa), runs(48)).tokens == 48
    assert store.load(group[0].token_T, chain(gqa), runs(48)).tokens == 40
    store.gc(lambda _: False)
    assert store.load(group[3].token_T, chain(gqa), runs(48)).tokens == 0


def test_a_rollout_that_grew_saves_only_new_blocks(
    store: KvStore, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any
) -> None:
    whole = make_arrays(gqa, 40)
    for tokens in (20, 40):
        part = type(whole)(whole.token_T[:tokens], tuple(a[:, :tokens] for a in whole.parts))
        store.save("1", part, chain(gqa), runs(tokens))
        store.commit()
    assert store.metrics.bytes_raw == (20 + 24) * gqa.token_bytes
    assert store.load(whole.token_T, chain(gqa), runs(40)).tokens == 40
    # Nobody refers to the partial block of the first snapshot any more.
    assert store.load(whole.token_T[:20], chain(gqa), runs(20)).tokens == 16


def test_garbage_is_given_back(tmp_path: Path, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any) -> None:
    arrays = [make_arrays(gqa, 64, seed) for seed in range(10)]
    with KvStore(tmp_path / "kv", codec="raw") as store:
        for i, a in enumerate(arrays):
            store.save(str(i), a, chain(gqa), runs(64))
        store.commit()
    with KvStore(tmp_path / "kv", codec="raw") as store:
        before = sum(path.stat().st_size for _, path in data_files(store.path))
        done = store.gc(lambda m: m.name in {"2", "5"})
        after = sum(path.stat().st_size for _, path in data_files(store.path))
        assert (done.snapshots_dead, done.files_removed, done.bytes_freed) == (8, 1, before - after)
        assert after < before / 3
        for i, a in enumerate(arrays):
            assert store.load(a.token_T, chain(gqa), runs(64)).tokens == (64 if i in {2, 5} else 0)
        store.gc(lambda m: False)
        assert list(data_files(store.path)) == []


def test_a_file_that_is_written_to_is_not_collected(
    tmp_path: Path, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any
) -> None:
    """Its records are not in anybody's index before they are complete."""
    arrays = make_arrays(gqa, 64)
    with (
        KvStore(tmp_path / "kv", index=tmp_path / "a", codec="raw") as writing,
        KvStore(tmp_path / "kv", index=tmp_path / "b", codec="raw") as collecting,
    ):
        writing.save("1", arrays, chain(gqa), runs(64))
        writing._writer._flush()
        collecting.gc(lambda _: False)
        assert [s.name for s in writing.commit()] == ["1"]
        assert writing.load(arrays.token_T, chain(gqa), runs(64)).tokens == 64


def test_the_budget_evicts_what_was_used_last_first(
    tmp_path: Path, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any
) -> None:
    arrays = [make_arrays(gqa, 64, seed) for seed in range(4)]
    with KvStore(tmp_path / "kv", codec="raw") as store:
        for i in range(3):
            store.save(str(i), arrays[i], chain(gqa), runs(64))
            store.commit()
        assert store.load(arrays[0].token_T, chain(gqa), runs(64), name="0").tokens == 64
        store.budget_bytes = store.bytes_used()
        store.save("3", arrays[3], chain(gqa), runs(64))
        store.commit()
        assert store.bytes_used() <= store.budget_bytes
        found = [store.load(a.token_T, chain(gqa), runs(64)).tokens for a in arrays]
    assert found == [64, 0, 64, 64]


def test_the_index_is_rebuilt_from_the_files(
    tmp_path: Path, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any
) -> None:
    group = [make_arrays(gqa, 40 + 8, seed, shared=40) for seed in range(3)]
    for i, arrays in enumerate(group):  # a process, and so a file, each
        with KvStore(tmp_path / "kv", codec="raw") as store:
            store.save(str(i), arrays, chain(gqa), runs(48))
            store.commit()
    shutil.rmtree(tmp_path / "kv" / "index")
    with KvStore(tmp_path / "kv", codec="raw") as store:
        assert {m.name for m in store._index.manifests()} == {"0", "1", "2"}
        store.gc(lambda m: m.name == "2")
        assert store.load(group[2].token_T, chain(gqa), runs(48)).tokens == 48
        assert store.load(group[1].token_T, chain(gqa), runs(48)).tokens == 40


def test_an_index_that_lmdb_calls_damaged_is_rebuilt(
    tmp_path: Path, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any
) -> None:
    arrays = make_arrays(gqa, TOKENS)
    with KvStore(tmp_path / "kv", codec="raw") as store:
        store.save("1", arrays, chain(gqa), runs(TOKENS))
        store.commit()
    data = tmp_path / "kv" / "index" / "data.mdb"
    data.write_bytes(b"\xff" * 8192 + data.read_bytes()[8192:])
    with KvStore(tmp_path / "kv", codec="raw") as store:
        assert store.load(arrays.token_T, chain(gqa), runs(TOKENS)).tokens == TOKENS


def test_two_machines_share_the_files(tmp_path: Path, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any) -> None:
    """Each with an index of its own, as on a shared file system."""
    arrays = make_arrays(gqa, TOKENS)
    with (
        KvStore(tmp_path / "kv", index=tmp_path / "a", codec="raw") as a,
        KvStore(tmp_path / "kv", index=tmp_path / "b", codec="raw") as b,
    ):
        a.save("1", arrays, chain(gqa), runs(TOKENS))
        a.commit()
        assert b.load(arrays.token_T, chain(gqa), runs(TOKENS)).tokens == 0
        b.refresh()
        assert b.load(arrays.token_T, chain(gqa), runs(TOKENS)).tokens == TOKENS


def every_byte(path: Path) -> Iterator[tuple[int, bool]]:
    """(offset, whether it means anything) of the record of the first block."""
    data = path.read_bytes()
    header = Header.decode(data)
    assert header is not None
    for at in range(header.record_bytes):
        yield at, at < HEADER_BYTES + header.stored_bytes


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_each_byte_of_a_snapshot_flipped(tmp_path: Path, make_arrays: Any, chain: Any, runs: Any, codec: str) -> None:
    """What is loaded is right, and a block of which any byte that means anything was flipped is not loaded."""
    tiny = KvLayout("bfloat16", (Attention(1, 4, 4),))
    arrays = make_arrays(tiny, 11)
    with KvStore(tmp_path / "kv", codec=codec) as store:
        store.save("1", arrays, chain(tiny, 4), runs(11))
        store.commit()
        path = the_file(store)
        data = path.read_bytes()
        blocks = [Header.decode(data[i * ALIGNMENT :]) for i in range(3)]
        rejected = 0
        for at in range(len(data)):
            block, within = divmod(at, ALIGNMENT)
            header = blocks[block] if block < 3 else None
            matters = header is not None and within < HEADER_BYTES + header.stored_bytes
            if not matters and at % 97:
                continue
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([data[at] ^ 0x10]))
            loaded = store.load(arrays.token_T, chain(tiny, 4), runs(11))
            prefix_is_right(loaded, arrays)
            assert loaded.tokens == (block * 4 if matters else 11), at
            if matters:
                rejected += 1
                assert loaded.reason in {"corrupt", "mismatch", "truncated"}
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(data[at : at + 1])
            if matters:  # it was taken out of the index: put it back
                store._index._env.sync()
                store._index.complete({header.key: _place_of(header)}, [], cut=lambda m, _: m)
        assert rejected == sum(HEADER_BYTES + h.stored_bytes for h in blocks if h is not None)


def _place_of(header: Header) -> Any:
    from rollout_wal.kv.data_files import Place

    return Place(header.file_id, header.offset, header.record_bytes)


@pytest.mark.parametrize(
    ("size", "left"),
    # The last cuts into padding only.
    [(0, 0), (50, 0), (ALIGNMENT, 8), (ALIGNMENT + 500, 8), (2 * ALIGNMENT - 1, 16)],
)
def test_a_truncated_file(
    store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any, size: int, left: int
) -> None:
    with open(the_file(store), "r+b") as file:
        file.truncate(size)
    loaded = store.load(saved.token_T, chain(gqa), runs(TOKENS))
    assert loaded.tokens == left
    assert loaded.reason == "truncated"
    assert store.metrics.fallbacks["truncated"] == 1
    prefix_is_right(loaded, saved)


def test_a_file_that_is_gone(store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any) -> None:
    the_file(store).unlink()
    store._reader.close()
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS)).reason == "missing"


def test_records_that_changed_places(store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any) -> None:
    """Intact, with right checksums, but another block's."""
    path = the_file(store)
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(data[ALIGNMENT : 2 * ALIGNMENT] + data[:ALIGNMENT])
    loaded = store.load(saved.token_T, chain(gqa), runs(TOKENS))
    assert (loaded.tokens, loaded.reason) == (0, "mismatch")


def test_a_lost_block_can_be_saved_again(store: KvStore, saved: Any, gqa: KvLayout, chain: Any, runs: Any) -> None:
    with open(the_file(store), "r+b") as file:
        file.seek(ALIGNMENT + 200)
        file.write(b"damage")
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS)).tokens == 8
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS)).reason == "partial"
    store.save("1", saved, chain(gqa), runs(TOKENS))
    store.commit()
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS)).tokens == TOKENS
    store.gc(lambda _: True)
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS)).tokens == TOKENS


def test_a_disk_that_refuses(
    store: KvStore, saved: Any, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of what was not durable is found, what was stays, and the next save is as good as any."""
    other = make_arrays(gqa, TOKENS, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("os.fdatasync", _no_space)
        store.save("2", other, chain(gqa), runs(TOKENS))
        with pytest.raises(KvError, match="No space"):
            store.commit()
    assert store.load(other.token_T, chain(gqa), runs(TOKENS)).tokens == 0
    assert store.load(saved.token_T, chain(gqa), runs(TOKENS)).tokens == TOKENS
    store.save("2", other, chain(gqa), runs(TOKENS))
    store.commit()
    assert store.load(other.token_T, chain(gqa), runs(TOKENS)).tokens == TOKENS


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_time_that_is_over_leaves_a_valid_beginning(
    store: KvStore, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = make_arrays(gqa, 800)
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    covered = store.save("1", arrays, chain(gqa), runs(800), until=20)
    monkeypatch.undo()
    store.commit()
    assert 0 < covered < 800
    loaded = store.load(arrays.token_T, chain(gqa), runs(800))
    assert loaded.tokens == covered
    prefix_is_right(loaded, arrays)
    manifest = store.manifest("1")
    assert manifest is not None
    assert manifest.tokens == covered


def test_large_writes_are_whole_and_aligned(
    tmp_path: Path, make_arrays: Any, chain: Any, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel takes or gives less than it is asked for, at odd places."""
    asked: list[tuple[int, int]] = []
    real_write, real_read = os.pwrite, os.preadv

    def pwrite(fd: int, data: Any, offset: int) -> int:
        asked.append((offset, len(data)))
        short = {2: 4096 * 3, 5: 4096 * 3 - 100}.get(len(asked))  # a multiple, and not
        if short is None:
            return real_write(fd, data, offset)
        real_write(fd, data[: 4096 * 3], offset)
        return short

    def preadv(fd: int, into: Any, offset: int) -> int:
        (view,) = into
        return real_read(fd, [view[: len(view) // 8192 * 4096] if len(view) > 8192 else view], offset)

    layout = KvLayout("float32", (Attention(4, 128, 128),) * 16)
    arrays = make_arrays(layout, 500)
    with KvStore(tmp_path / "kv", codec="raw") as store:
        monkeypatch.setattr("os.pwrite", pwrite)
        monkeypatch.setattr("os.preadv", preadv)
        store.save("1", arrays, chain(layout, 16), runs(500))
        store.commit()
        loaded = store.load(arrays.token_T, chain(layout, 16), runs(500))
        assert loaded.tokens == 500
        prefix_is_right(loaded, arrays)
    assert asked[0] == (0, 8 * ((1 << 20) + ALIGNMENT))  # the first 8 MiB, in whole records
    assert len(asked) == 4 + 2
    assert sum(offset % ALIGNMENT != 0 for offset, _ in asked) == 1


@pytest.mark.parametrize("refused", ["open", "transfer"])
def test_a_file_system_without_direct_io(
    tmp_path: Path,
    make_arrays: Any,
    gqa: KvLayout,
    chain: Any,
    runs: Any,
    monkeypatch: pytest.MonkeyPatch,
    refused: str,
) -> None:
    """It goes through the page cache then."""
    real_open, real_write, real_read = os.open, os.pwrite, os.preadv
    seen = 0

    def refuse(flags: int) -> None:
        nonlocal seen
        if flags & os.O_DIRECT:
            seen += 1
            raise OSError(errno.EINVAL, "Invalid argument")

    def no_direct(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:  # as on some file systems, the name is made all the same
            os.close(real_open(path, flags & ~os.O_DIRECT, *rest, **options))
        refuse(flags)
        return real_open(path, flags & ~os.O_EXCL, *rest, **options)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        refuse(fcntl.fcntl(fd, fcntl.F_GETFL))
        return real_write(fd, data, offset)

    def preadv(fd: int, into: Any, offset: int) -> int:
        refuse(fcntl.fcntl(fd, fcntl.F_GETFL))
        return real_read(fd, into, offset)

    if refused == "open":
        monkeypatch.setattr("os.open", no_direct)
    else:
        monkeypatch.setattr("os.pwrite", pwrite)
        monkeypatch.setattr("os.preadv", preadv)
    arrays = make_arrays(gqa, TOKENS)
    with KvStore(tmp_path / "kv", codec="raw") as store:
        store.save("1", arrays, chain(gqa), runs(TOKENS))
        store.commit()
        loaded = store.load(arrays.token_T, chain(gqa), runs(TOKENS))
    assert loaded.tokens == TOKENS
    prefix_is_right(loaded, arrays)
    assert seen == 2  # once for the writer's file, once for the reader's


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_arrays_of_the_caller_are_filled(
    tmp_path: Path, layout: KvLayout, codec: str, make_arrays: Any, chain: Any, runs: Any
) -> None:
    """Pinned memory for example; it may be longer than what is loaded."""
    arrays, room = make_arrays(layout, TOKENS), make_arrays(layout, 50, seed=7)
    with KvStore(tmp_path / "kv", codec=codec) as store:
        store.save("1", arrays, chain(layout), runs(TOKENS))
        store.commit()
        loaded = store.load(arrays.token_T, chain(layout), runs(TOKENS), into=room)
        assert loaded.tokens == TOKENS
        assert loaded.arrays is not None
        for got, mine, right in zip(loaded.arrays.parts, room.parts, arrays.parts, strict=True):
            assert got.base is mine
            np.testing.assert_array_equal(got, right)
        for got, right in zip(room.states, arrays.states, strict=True):
            np.testing.assert_array_equal(got, right)
        if layout.token_parts:
            with pytest.raises(KvError, match="tokens"):
                store.load(arrays.token_T, chain(layout), runs(TOKENS), into=make_arrays(layout, TOKENS - 1))


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype", lambda a: a.view(np.int16)),
        ("heads", lambda a: a[:1]),
        ("head_dim", lambda a: a[..., :8]),
        ("tokens", lambda a: a[:, :3]),
    ],
)
def test_arrays_of_another_layout_are_refused_by_name(
    store: KvStore, gqa: KvLayout, make_arrays: Any, chain: Any, runs: Any, reason: str, change: Any
) -> None:
    good = make_arrays(gqa, TOKENS)
    wrong = KvArrays(good.token_T, (*good.parts[:-1], change(good.parts[-1])))
    with pytest.raises(KvMismatch) as caught:
        store.save("1", wrong, chain(gqa), runs(TOKENS))
    assert caught.value.reason == reason
    with pytest.raises(KvMismatch) as caught:
        store.save("1", KvArrays(good.token_T, good.parts[:-1]), chain(gqa), runs(TOKENS))
    assert caught.value.reason == "layers"
