"""An engine's KV leaves it and comes back: what follows is that of the uninterrupted run, and KV was used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_wal.engines.hf import HFEngine
from rollout_wal.engines.hf.kv import RequestKv
from rollout_wal.errors import BadInput
from rollout_wal.kv import KvArrays, KvConfig, KvStore, Snapshots
from rollout_wal.kv.data_files import data_files
from rollout_wal.kv.layout import KvMismatch

PROMPT = list(range(10, 45))
DONE = 37
"""Output tokens when the engine is preempted."""
COMPUTED = len(PROMPT) + DONE - 1
"""Tokens whose KV there is then: all but the last."""


class CountingEngine(HFEngine):
    """Counts the tokens that go through the model."""

    computed = 0

    def _pack(self, *args: Any) -> Any:
        packed = super()._pack(*args)
        self.computed += len(packed[0]) - packed[2].padding
        return packed


@pytest.fixture(scope="module")
def whole(model: Path, request_of: Any, run_engine: Any) -> list[int]:
    """The output of an uninterrupted run."""
    engine = HFEngine.from_folder(model)
    engine.add(request_of(0, PROMPT))
    return run_engine(engine)


@contextmanager
def opened(folder: Path, engine: Any, **config: Any) -> Iterator[Snapshots]:
    given = {"codec": "raw", "block_tokens": 16, **config}
    snapshots = Snapshots(KvConfig(str(folder / "kv"), **given), engine, lambda _: True)
    try:
        yield snapshots
    finally:
        snapshots.close()


@pytest.fixture
def preempted(model: Path, tmp_path: Path, request_of: Any, run_engine: Any, whole: list[int]) -> list[int]:
    """A rollout 7 whose KV was saved. Returns its output so far."""
    engine = HFEngine.from_folder(model)
    with opened(tmp_path, engine) as snapshots:
        engine.add(request_of(0, PROMPT))
        out = run_engine(engine, DONE)
        (saved,) = snapshots.save({7: 0})
        assert (saved.rollout, saved.tokens) == (7, COMPUTED)
    assert out == whole[:DONE]
    return out


Resume = Callable[..., tuple[list[int], Any, Any]]


@pytest.fixture
def resume(model: Path, tmp_path: Path, request_of: Any, run_engine: Any) -> Resume:
    """(prefix, model, **config) -> (tokens that follow, Resumed, engine)"""

    def go(prefix: list[int], folder: Path = model, dtype: str = "float32", **config: Any) -> Any:
        engine = CountingEngine.from_folder(folder, dtype=dtype)
        with opened(tmp_path, engine, **config) as snapshots:
            resumed = snapshots.add(7, request_of(0, PROMPT, prefix))
            return run_engine(engine), resumed, engine

    return go


def test_a_resumed_rollout_goes_on_as_if_nothing_had_happened(
    preempted: list[int], resume: Resume, whole: list[int]
) -> None:
    rest, resumed, engine = resume(preempted)
    assert preempted + rest == whole
    assert (resumed.loaded, resumed.reason) == (COMPUTED, "")
    # One token for its logits, and then one per step: the last is sampled and never computed.
    assert engine.computed == len(whole) - DONE


def test_without_its_kv_it_is_prefilled(resume: Resume, whole: list[int]) -> None:
    rest, resumed, engine = resume(whole[:DONE])
    assert whole[:DONE] + rest == whole
    assert (resumed.loaded, resumed.reason) == (0, "missing")
    assert engine.computed == COMPUTED + len(whole) - DONE


def test_restored_bytes_are_identical(
    model: Path, tmp_path: Path, preempted: list[int], request_of: Any, run_engine: Any
) -> None:
    """Those of the engine that resumed, after its next step, and those of one that was never interrupted."""
    never, resumed = HFEngine.from_folder(model), HFEngine.from_folder(model)
    never.add(request_of(0, PROMPT))
    run_engine(never, DONE + 1)
    with opened(tmp_path, resumed) as snapshots:
        snapshots.add(7, request_of(0, PROMPT, preempted))
        run_engine(resumed, 1)
    a, b = never.save_kv(0), resumed.save_kv(0)
    assert a is not None
    assert b is not None
    assert len(a) == len(b) == COMPUTED + 1
    for x, y in zip(a.parts, b.parts, strict=True):
        np.testing.assert_array_equal(x, y)


def test_wrong_kv_under_a_right_hash_would_be_noticed(
    model: Path, tmp_path: Path, resume: Resume, request_of: Any, run_engine: Any, whole: list[int]
) -> None:
    """The other tests compare tokens. This one plants KV whose name, place and checksum are right: their comparison
    fails, so they would notice."""
    engine = HFEngine.from_folder(model)
    with opened(tmp_path, engine) as snapshots:
        engine.add(request_of(0, PROMPT))
        run_engine(engine, DONE)
        real = engine.save_kv

        def wrong(slot: int) -> Any:
            arrays = real(slot)
            assert arrays is not None
            # All signs flipped. (Tokens in another order would do no harm: attention sums over a set.)
            return type(arrays)(arrays.token_T, tuple(a ^ np.uint32(1 << 31) for a in arrays.parts))

        engine.save_kv = wrong  # type: ignore[method-assign]
        snapshots.save({7: 0})
    rest, resumed, _ = resume(whole[:DONE])
    assert resumed.loaded == COMPUTED
    assert whole[:DONE] + rest != whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back(
    model: Path, tmp_path: Path, request_of: Any, run_engine: Any, resume: Resume, dtype: str
) -> None:
    engine = HFEngine.from_folder(model, dtype=dtype)
    with opened(tmp_path, engine, codec="planes") as snapshots:
        engine.add(request_of(0, PROMPT))
        out = run_engine(engine, DONE)
        before = engine.save_kv(0)
        snapshots.save({7: 0})
        rest = run_engine(engine)
    again, resumed, _ = resume(out, dtype=dtype)
    assert resumed.loaded == COMPUTED
    assert again == rest
    assert before is not None
    # The same bits in another format are something else.
    assert resume(out, dtype="float32")[1].loaded == 0


def test_kv_of_other_weights_is_not_loaded(
    preempted: list[int], other_model: Path, resume: Resume, request_of: Any, run_engine: Any
) -> None:
    plain = HFEngine.from_folder(other_model)
    plain.add(request_of(0, PROMPT, preempted))
    rest, resumed, _ = resume(preempted, other_model)
    assert (resumed.loaded, resumed.reason) == (0, "missing")
    assert rest == run_engine(plain)


def test_another_block_size_is_not_loaded(preempted: list[int], resume: Resume, whole: list[int]) -> None:
    rest, resumed, _ = resume(preempted, block_tokens=8)
    assert resumed.loaded == 0
    assert preempted + rest == whole


def test_other_tokens_are_loaded_as_far_as_they_agree(
    preempted: list[int], model: Path, resume: Resume, request_of: Any, run_engine: Any
) -> None:
    other = [*preempted[:20], preempted[20] ^ 1, *preempted[21:]]
    plain = HFEngine.from_folder(model)
    plain.add(request_of(0, PROMPT, other))
    rest, resumed, _ = resume(other)
    assert resumed.loaded == (len(PROMPT) + 20) // 16 * 16
    assert rest == run_engine(plain)


@pytest.mark.parametrize("block", [0, 2, 4])
def test_damage_is_told_and_prefilled(
    preempted: list[int],
    tmp_path: Path,
    resume: Resume,
    whole: list[int],
    block: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ((_, path),) = data_files(tmp_path / "kv")
    data = bytearray(path.read_bytes())
    length = 12288  # of a whole block's record: 16 tokens of 512 bytes, and a header
    data[block * length + 500] ^= 1
    path.write_bytes(data)
    rest, resumed, engine = resume(preempted)
    assert preempted + rest == whole
    assert (resumed.loaded, resumed.reason) == (block * 16, "corrupt")
    assert engine.computed == COMPUTED - block * 16 + len(whole) - DONE
    assert "checksum" in caplog.text
    assert f"KV of {block * 16} of {COMPUTED} tokens was loaded" in caplog.text


def test_an_engine_that_refuses_saved_kv_gets_none(
    preempted: list[int], model: Path, tmp_path: Path, request_of: Any, run_engine: Any, whole: list[int]
) -> None:
    from rollout_wal.errors import KvError

    engine = HFEngine.from_folder(model)

    def refuse(*_: Any) -> None:
        raise KvError("not this")

    engine.add_with_kv = refuse  # type: ignore[method-assign]
    with opened(tmp_path, engine) as snapshots:
        resumed = snapshots.add(7, request_of(0, PROMPT, preempted))
        assert (resumed.loaded, resumed.reason) == (0, "refused")
        assert snapshots.store.metrics.fallbacks["refused"] == 1
        assert preempted + run_engine(engine) == whole


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype", lambda a: a.astype(np.uint16)),
        ("heads", lambda a: a[:1]),
        ("head_dim", lambda a: a[..., :-1]),
        ("tokens", lambda a: a[:, :-1]),
        ("layers", None),
    ],
)
def test_kv_of_another_shape_is_refused_by_name_and_prefilled(
    preempted: list[int],
    model: Path,
    tmp_path: Path,
    request_of: Any,
    run_engine: Any,
    whole: list[int],
    caplog: pytest.LogCaptureFixture,
    reason: str,
    change: Any,
) -> None:
    """Should the store ever hand out something else than the engine keeps, the engine notices."""
    engine = HFEngine.from_folder(model)
    with opened(tmp_path, engine) as snapshots:
        real = snapshots.store.load

        def wrong(*args: Any, **options: Any) -> Any:
            loaded = real(*args, **options)
            assert loaded.arrays is not None
            parts = loaded.arrays.parts
            parts = parts[:-2] if change is None else (*parts[:-1], change(parts[-1]))
            return replace(loaded, arrays=KvArrays(loaded.arrays.token_T, parts))

        snapshots.store.load = wrong  # type: ignore[method-assign]
        resumed = snapshots.add(7, request_of(0, PROMPT, preempted))
        assert (resumed.loaded, resumed.reason) == (0, f"refused_{reason}")
        assert snapshots.store.metrics.fallbacks[f"refused_{reason}"] == 1
        assert f"does not fit ({reason})" in caplog.text
        assert preempted + run_engine(engine) == whole


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype", lambda t: t.double()),
        ("heads", lambda t: t[:1]),
        ("head_dim", lambda t: t[..., :-1]),
        ("tokens", lambda t: t[:, :-1]),
    ],
)
def test_tensors_of_another_shape_are_refused_by_name(
    model: Path, request_of: Any, run_engine: Any, reason: str, change: Any
) -> None:
    engine = HFEngine.from_folder(model)
    engine.add(request_of(0, PROMPT))
    out = run_engine(engine, 5)
    kv = engine.export_kv(0)
    (first, (k, v)) = kv.layers
    other = HFEngine.from_folder(model)
    with pytest.raises(KvMismatch) as caught:
        other.add(request_of(0, PROMPT, out), kv=RequestKv(kv.tokens, (first, (k, change(v)))))
    assert caught.value.reason == reason
    assert other.unfinished == 0
    with pytest.raises(KvMismatch) as caught:
        other.add(request_of(0, PROMPT, out), kv=RequestKv(kv.tokens, (first,)))
    assert caught.value.reason == "layers"


def test_an_unknown_layout_is_named_and_prefilled(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = HFEngine.from_folder(model)
    engine.kv_layout = lambda: {"dtype": "float32", "layers": [{"kind": "hyena"}]}  # type: ignore[method-assign]
    config = KvConfig(str(tmp_path / "kv"))
    assert Snapshots.open(config, engine, lambda _: True) is None
    assert "hyena" in caplog.text


def test_a_store_that_cannot_be_opened_is_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kv").write_text("a file, not a directory")
    assert Snapshots.open(KvConfig(str(tmp_path / "kv")), HFEngine.from_folder(model), lambda _: True) is None
    assert "cannot be opened" in caplog.text


def test_configurations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BadInput, match="block_tokens=0"):
        KvConfig("kv", block_tokens=0)
    with pytest.raises(BadInput, match="codec='gzip'"):
        KvConfig("kv", codec="gzip")


def test_the_longest_is_saved_first_and_time_is_kept(
    model: Path, tmp_path: Path, request_of: Any, run_engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = HFEngine.from_folder(model)
    for slot, length in enumerate((20, 200, 90)):
        engine.add(request_of(slot, list(range(10, 10 + length))))
    run_engine(engine, 5)
    running = {10: 0, 11: 1, 12: 2}
    with opened(tmp_path, engine, grace_s=30.0) as snapshots:
        assert [s.rollout for s in snapshots.save(running)] == [11, 12, 10]
    with caplog.at_level(logging.WARNING), opened(tmp_path / "b", engine, grace_s=0.0) as snapshots:
        assert snapshots.save(running) == []
        assert snapshots.store.metrics.fallbacks["grace"] == 1
        assert "grace time of 0.0 s" in caplog.text


def test_background_snapshots(
    model: Path, tmp_path: Path, request_of: Any, run_engine: Any, resume: Resume, whole: list[int]
) -> None:
    """Saved while it runs, so that a kill without notice too finds something."""
    engine = HFEngine.from_folder(model)
    seen = []
    with opened(tmp_path, engine, every_tokens=10) as snapshots:
        engine.add(request_of(0, PROMPT))
        out: list[int] = []
        while len(out) < DONE:
            step = engine.step()
            out += step.token_N.tolist()
            snapshots.stepped(step.slot_N, {0: 7})
            if snapshots._saving is not None:
                snapshots._saving.result()
            seen += [s.tokens for s in snapshots.saved()]
    assert seen == [len(PROMPT) + n - 1 for n in (10, 20, 30)]
    rest, resumed, _ = resume(out)
    assert resumed.loaded == seen[-1]
    assert out + rest == whole


@pytest.mark.parametrize("on_update", ["recompute", "keep"])
def test_a_policy_update(
    model: Path, other_model: Path, tmp_path: Path, request_of: Any, run_engine: Any, on_update: Any
) -> None:
    """Recomputed by default; kept by option, which the engine's description then says. Either way a resumed rollout
    does what one that was not interrupted does."""

    def start(folder: Path) -> tuple[Any, Any, list[int]]:
        engine = HFEngine.from_folder(model)
        snapshots = opened(folder, engine, on_update=on_update)
        s = snapshots.__enter__()
        engine.add(request_of(0, PROMPT))
        out = run_engine(engine, 20)
        s.before_update({7: 0})
        engine.load_weights(other_model, 1)
        s.updated()
        out += run_engine(engine, 20)
        return engine, (snapshots, s), out

    uninterrupted, (context, _), out = start(tmp_path / "a")
    whole = out + run_engine(uninterrupted)
    context.__exit__(None, None, None)

    engine, (context, s), out = start(tmp_path / "b")
    (saved,) = s.save({7: 0})
    assert saved.tokens == len(PROMPT) + 39
    manifest = s.store.manifest("7")
    context.__exit__(None, None, None)
    assert [(r.tokens, r.version) for r in manifest.runs] == (
        [(len(PROMPT) + 19, 0), (20, 1)] if on_update == "keep" else [(len(PROMPT) + 39, 1)]
    )
    assert engine.info.extras.get("kv_on_update") == ("keep" if on_update == "keep" else None)

    resumed_engine = CountingEngine.from_folder(other_model, policy_version=1)
    with opened(tmp_path / "b", resumed_engine, on_update=on_update) as snapshots:
        resumed = snapshots.add(7, request_of(0, PROMPT, out))
        assert resumed.loaded == len(PROMPT) + 39
        assert out + run_engine(resumed_engine) == whole


def test_kept_and_recomputed_kv_differ(
    model: Path, other_model: Path, tmp_path: Path, request_of: Any, run_engine: Any
) -> None:
    """Or the test above could not tell one from the other."""
    outs = []
    for keep in (False, True):
        engine = HFEngine.from_folder(model)
        if keep:
            engine.keep_kv()
        engine.add(request_of(0, PROMPT))
        out = run_engine(engine, 20)
        engine.load_weights(other_model, 1)
        outs.append(out + run_engine(engine))
    assert outs[0] != outs[1]
    assert outs[0][:20] == outs[1][:20]


def test_what_is_over_or_of_old_weights_is_collected(
    model: Path, other_model: Path, tmp_path: Path, request_of: Any, run_engine: Any
) -> None:
    engine = HFEngine.from_folder(model)
    over: set[int] = set()
    snapshots = Snapshots(KvConfig(str(tmp_path / "kv"), codec="raw"), engine, lambda rollout: rollout not in over)
    for slot in range(2):
        engine.add(request_of(slot, PROMPT[slot:]))
    run_engine(engine, 5)
    snapshots.save({1: 0, 2: 1})
    over.add(1)
    snapshots.collect()
    snapshots._settle()
    assert snapshots.store.manifest("1") is None
    assert snapshots.store.manifest("2") is not None
    snapshots.before_update({1: 0, 2: 1})
    engine.load_weights(other_model, 1)
    snapshots.updated()
    snapshots._settle()
    assert snapshots.store.manifest("2") is None
    snapshots.close()
    with KvStore(tmp_path / "kv", codec="raw") as store:
        assert store.bytes_used() == 0
