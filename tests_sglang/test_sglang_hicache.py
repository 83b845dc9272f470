"""The storage tier against SGLang's own interface, as its cache controller calls it, with CPU tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from rollout_wal.engines.sglang import plugin
from rollout_wal.errors import KvError

KEYS = [f"{n:064x}" for n in range(6)]


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets what the plug-in would say of the weights in force."""
    monkeypatch.setenv(plugin.LOG, str(tmp_path / "wal"))

    def change(value: tuple[int, str] | None) -> None:
        monkeypatch.setattr(plugin, "kv_weights", lambda: value)

    change((0, "w0"))
    return change


def config(path: Path | None, **options: Any) -> HiCacheStorageConfig:
    extra = {
        "backend_name": "rollout_wal",
        "module_path": "rollout_wal.engines.sglang.hicache",
        "class_name": "RolloutKvStorage",
        **({"path": str(path)} if path is not None else {}),
    }
    given = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1, **options}
    return HiCacheStorageConfig(
        is_mla_model=given.pop("is_mla_model", False),
        enable_storage_metrics=False,
        is_page_first_layout=False,
        model_name="m",
        extra_config=extra,
        **given,
    )


def made(path: Path | None, **options: Any) -> Any:
    return StorageBackendFactory.create_backend("dynamic", config(path, **options), None)


@pytest.fixture
def storage(weights: Callable[..., None], tmp_path: Path) -> Iterator[Any]:
    backend = made(tmp_path / "kv")
    yield backend
    backend.close()


def pages(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 * 2 * 16 * 32, generator=generator).to(dtype) for _ in KEYS]


def empty(like: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(page) for page in like]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_pages_come_back_bit_for_bit(storage: Any, dtype: torch.dtype) -> None:
    assert isinstance(storage, HiCacheStorage)
    values = pages(dtype)
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_set(KEYS[:4], values[:4])
    assert storage.batch_exists(KEYS) == 4
    assert storage.exists(KEYS[3])
    assert not storage.exists(KEYS[4])
    targets = empty(values)
    out = storage.batch_get(KEYS, targets)
    assert [page is not None for page in out] == [True] * 4 + [False] * 2
    for page, value in zip(out[:4], values[:4], strict=True):
        assert torch.equal(page.view(torch.uint8), value.view(torch.uint8))
    assert storage.get(KEYS[5], targets[5]) is None
    assert storage.set(KEYS[5], values[5])
    assert torch.equal(storage.get(KEYS[5], targets[5]).view(torch.uint8), values[5].view(torch.uint8))


def test_the_interface_is_the_one_that_was_read(storage: Any) -> None:
    for name in ("get", "batch_get", "set", "batch_set", "exists", "batch_exists", "clear", "get_stats"):
        theirs = list(inspect.signature(getattr(HiCacheStorage, name)).parameters)
        ours = list(inspect.signature(getattr(type(storage), name)).parameters)
        assert ours == theirs, name


def test_pages_of_other_weights_are_never_handed_out(storage: Any, weights: Callable[..., None]) -> None:
    old, new = pages(seed=1), pages(seed=2)
    assert storage.batch_set(KEYS, old)
    weights((1, "w1"))
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_get(KEYS, empty(old)) == [None] * 6
    assert storage.batch_set(KEYS, new)
    assert torch.equal(storage.get(KEYS[0], torch.zeros_like(old[0])), new[0])
    # The same number for other weights, and weights of which it is not known which KV is theirs.
    for other in ((1, "w2"), None):
        weights(other)
        assert storage.batch_exists(KEYS) == 0
        assert storage.get(KEYS[0], torch.zeros_like(old[0])) is None
    assert not storage.batch_set(KEYS, new)


def test_pages_outlive_the_process_and_damage_is_a_miss(
    storage: Any, weights: Callable[..., None], tmp_path: Path
) -> None:
    values = pages()
    assert storage.batch_set(KEYS, values)
    storage.close()
    again = made(tmp_path / "kv")
    assert again.batch_exists(KEYS) == 6
    assert torch.equal(again.get(KEYS[2], torch.zeros_like(values[2])), values[2])
    again.close()
    files = sorted(
        (p for p in (tmp_path / "kv").rglob("*") if p.is_file() and "index" not in str(p)),
        key=lambda p: -p.stat().st_size,
    )
    data = bytearray(files[0].read_bytes())
    for at in range(0, len(data), 64):
        data[at] ^= 0x55
    files[0].write_bytes(data)
    damaged = made(tmp_path / "kv")
    targets = empty(values)
    for key, page, value in zip(KEYS, damaged.batch_get(KEYS, targets), values, strict=True):
        assert page is None or torch.equal(page, value), key
    assert damaged.get(KEYS[0], targets[0]) is None
    damaged.close()


def test_ranks_do_not_share_their_shards(storage: Any, tmp_path: Path) -> None:
    assert storage.batch_set(KEYS, pages())
    other = made(tmp_path / "kv", tp_rank=1, tp_size=2)
    assert other.batch_exists(KEYS) == 0
    other.close()


def test_what_it_needs(weights: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KvError, match="no path"):
        made(None)
    monkeypatch.delenv(plugin.LOG)
    with pytest.raises(KvError, match="is not set"):
        made(tmp_path / "kv")


def test_clear(storage: Any) -> None:
    assert storage.batch_set(KEYS, pages())
    storage.clear()
    assert storage.batch_exists(KEYS) == 0
