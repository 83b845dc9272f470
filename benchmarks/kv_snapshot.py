"""KV snapshots against the bare disk, and against prefill.

The KV of a 7B-class model (32 layers, 8 KV heads, 128, bf16) is saved and restored; the floor writes and syncs the same
bytes from one buffer, and reads them with a cold cache into another, interleaved with it; what counts is the faster of
the page cache and O_DIRECT, time by time. Then a group that shares a prompt is saved, and for the demo's model loading
is compared with prefill at growing lengths.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from rollout_wal.kv import Chain, Codec, KvArrays, KvLayout, KvStore, Run
from rollout_wal.kv.data_files import data_files
from rollout_wal.kv.layout import Attention
from rollout_wal.kv.memory import aligned

from ._common import save, show

SHAPE = KvLayout("bfloat16", (Attention(8, 128, 128),) * 32)
CHAIN = Chain(SHAPE, "benchmark")
CHUNK = 16 << 20


def synthetic(tokens: int, seed: int = 0) -> KvArrays:
    """KV whose values are normally distributed, each head dimension with a scale of its own, as channels of KV are."""
    rng = np.random.default_rng(seed)
    parts = []
    for part in SHAPE.token_parts:
        scale = np.exp(rng.standard_normal((part.heads, 1, part.dim), np.float32))
        values = rng.standard_normal((part.heads, tokens, part.dim), np.float32) * scale
        parts.append((values.view(np.uint32) >> 16).astype(np.uint16))
    return KvArrays(rng.integers(0, 1 << 15, tokens).astype(np.int32), tuple(parts))


def runs(tokens: int) -> tuple[Run, ...]:
    return (Run(tokens, 1, "weights"),)


def drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def floor_write(folder: Path, data: NDArray[np.uint8], flags: int) -> float:
    """Seconds for writing and syncing these bytes."""
    path = folder / "floor"
    start = time.perf_counter()
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | flags)
    for at in range(0, data.nbytes, CHUNK):
        os.pwrite(fd, data[at : at + CHUNK].data, at)
    os.fdatasync(fd)
    seconds = time.perf_counter() - start
    os.close(fd)
    return seconds


def floor_read(folder: Path, into: NDArray[np.uint8], flags: int) -> float:
    """Seconds for reading them back with a cold cache, into memory that is there already."""
    path = folder / "floor"
    drop_cache(path)
    start = time.perf_counter()
    fd = os.open(path, os.O_RDONLY | flags)
    for at in range(0, into.nbytes, CHUNK):
        os.preadv(fd, [into[at : at + CHUNK].data], at)
    os.close(fd)
    return time.perf_counter() - start


def faster(floor: Callable[[int], float]) -> float:
    """Through the page cache or past it (O_DIRECT), whichever is faster here."""
    return min(floor(0), floor(os.O_DIRECT))


@dataclass(frozen=True)
class Round:
    """Seconds of one save and of two restores with a cold cache; raw bytes per stored byte."""

    save: float
    restore: float
    """Into memory that is there already, as the floor reads."""
    restore_fresh: float
    """Into memory that is allocated for it."""
    ratio: float


def once(folder: Path, arrays: KvArrays, into: KvArrays, codec: Codec, number: int) -> Round:
    """Save and restore into a store of its own."""
    where = folder / f"{codec.name}-{number}"
    with KvStore(where, codec=codec) as store:
        start = time.perf_counter()
        store.save("1", arrays, CHAIN, runs(len(arrays)))
        store.commit()
        saved = time.perf_counter() - start
        restored = []
        for room in (into, None):
            for _, path in data_files(where):
                drop_cache(path)
            start = time.perf_counter()
            loaded = store.load(arrays.token_T, CHAIN, runs(len(arrays)), into=room)
            restored.append(time.perf_counter() - start)
            assert loaded.tokens == len(arrays)
            assert loaded.arrays is not None
            assert all(np.array_equal(a, b) for a, b in zip(loaded.arrays.parts, arrays.parts, strict=True))
            for part in into.parts:
                part[...] = 0
        ratio = store.metrics.bytes_raw / store.metrics.bytes_written
    for _, path in data_files(where):
        path.unlink()
    return Round(saved, restored[0], restored[1], ratio)


def dedup(folder: Path, group: int, prompt: int, output: int) -> float:
    """Bytes of the prompts of a group, per byte stored of them."""
    whole = synthetic(prompt + output * group)
    with KvStore(folder / "group", codec=Codec.RAW) as store:
        alone = 0
        for member in range(group):
            tail = slice(prompt + member * output, prompt + (member + 1) * output)
            arrays = KvArrays(
                np.concatenate((whole.token_T[:prompt], whole.token_T[tail])),
                tuple(np.concatenate((a[:, :prompt], a[:, tail]), axis=1) for a in whole.parts),
            )
            store.save(str(member), arrays, CHAIN, runs(len(arrays)))
            alone += prompt * SHAPE.token_bytes
        store.commit()
        outputs = group * output * SHAPE.token_bytes
        stored = store.metrics.bytes_raw - outputs
    for _, path in data_files(folder / "group"):
        path.unlink()
    return alone / stored


def crossover(folder: Path, lengths: list[int], repeat: int) -> list[dict[str, Any]]:
    """For the demo's model: seconds until the next token of a resumed rollout, by prefill and from a snapshot."""
    import torch

    from rollout_wal.engines.base import Request
    from rollout_wal.engines.hf import HFEngine
    from rollout_wal.kv import KvConfig, Snapshots
    from rollout_wal.params import SamplingParams
    from rollout_wal.testing.tiny_models import make_tiny_model

    torch.set_num_threads(1)
    model = make_tiny_model(folder / "model", max_context=2 * max(lengths))
    rng = np.random.default_rng(0)
    out = []
    for length in lengths:
        token_T = rng.integers(8, 260, length).astype(np.int32)
        # The last token is never in the cache: it is computed for its logits.
        saved, resumed_request = (
            Request(0, t, t[:0], t[:0].astype(bool), SamplingParams(max_tokens=2), 1) for t in (token_T[:-1], token_T)
        )
        prefill, load = [], []
        engine = HFEngine.from_folder(model)
        config = KvConfig(str(folder / f"kv-{length}"), codec="raw")
        snapshots = Snapshots(config, engine, lambda _: True)
        for n in range(repeat + 1):
            if n == 0:
                engine.add(saved)
                while not len(engine.step().slot_N):
                    pass
                snapshots.save({1: 0})
                engine.abort(0)
            start = time.perf_counter()
            engine.add(resumed_request)
            while not len(engine.step().slot_N):
                pass
            prefill.append(time.perf_counter() - start)
            engine.abort(0)
            for _, path in data_files(Path(config.path)):
                drop_cache(path)
            start = time.perf_counter()
            resumed = snapshots.add(1, resumed_request)
            while not len(engine.step().slot_N):
                pass
            load.append(time.perf_counter() - start)
            assert resumed.loaded == length - 1, resumed
            engine.abort(0)
        snapshots.close()
        engine.close()
        out.append(
            {
                "tokens": length,
                "prefill_s": statistics.median(prefill[1:]),
                "load_s": statistics.median(load[1:]),
            }
        )
    return out


@click.command()
@click.option("--quick", is_flag=True, help="Fewer tokens and repetitions.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="On the disk to measure.")
def main(quick: bool, json_path: Path | None, folder: Path) -> None:
    """Save and restore KV of a 7B-class shape; compare with the bare disk and with prefill."""
    tokens, repeat = (1024, 3) if quick else (4096, 7)
    arrays = synthetic(tokens)
    data = aligned(sum(a.nbytes for a in arrays.parts))
    at = 0
    for array in arrays.parts:
        data[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += array.nbytes
    into = aligned(data.nbytes)
    into[:] = 0
    room = KvArrays(arrays.token_T, tuple(np.full_like(a, 1) for a in arrays.parts))
    floors: dict[str, list[float]] = {"write": [], "read": []}
    rounds: dict[Codec, list[Round]] = {codec: [] for codec in Codec}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".kv-benchmark-") as name:
        where = Path(name)
        for n in range(repeat + 1):
            write = faster(lambda flags: floor_write(where, data, flags))
            read = faster(lambda flags: floor_read(where, into, flags))
            (where / "floor").unlink()
            done = {codec: once(where, arrays, room, codec, n) for codec in Codec}
            if n == 0:
                continue  # the machine hands out memory that was never touched
            floors["write"].append(write)
            floors["read"].append(read)
            for codec in Codec:
                rounds[codec].append(done[codec])
        with KvStore(where / "choice", codec="auto") as store:
            chosen = store.codec
        dedup_ratio = dedup(where, 8, *((512, 64) if quick else (1024, 128)))
        lengths = crossover(where, [64, 256, 1024] if quick else [16, 64, 256, 1024, 2048], 3 if quick else 5)

    def ratio(floor: str, codec: Codec, which: str) -> float:
        """Of interleaved pairs, the median."""
        pairs = zip(floors[floor], rounds[codec], strict=True)
        return statistics.median(bare / float(getattr(ours, which)) for bare, ours in pairs)

    def rate(codec: Codec, which: str) -> str:
        return f"{mib / statistics.median(getattr(r, which) for r in rounds[codec]):.0f} MiB/s"

    mib = data.nbytes / 2**20
    crossing = next((row["tokens"] for row in lengths if row["load_s"] < row["prefill_s"]), None)
    result: dict[str, Any] = {
        "tokens": tokens,
        "bytes": data.nbytes,
        "codec_chosen": chosen.name.lower(),
        "save_ratio_to_floor": ratio("write", chosen, "save"),
        "restore_ratio_to_floor": ratio("read", chosen, "restore"),
        "restore_fresh_memory_ratio_to_floor": ratio("read", chosen, "restore_fresh"),
        "save_ratio_to_floor_by_codec": {c.name.lower(): ratio("write", c, "save") for c in Codec},
        "restore_ratio_to_floor_by_codec": {c.name.lower(): ratio("read", c, "restore") for c in Codec},
        "compression_ratio": statistics.median(r.ratio for r in rounds[Codec.PLANES]),
        "prompt_dedup_ratio": dedup_ratio,
        "floor_write_mib_s": mib / statistics.median(floors["write"]),
        "floor_read_mib_s": mib / statistics.median(floors["read"]),
        "demo_model": lengths,
        "crossover_tokens": crossing,
    }
    show(
        f"KV of {tokens} tokens, {mib:.0f} MiB, bf16",
        ["", "save", "of floor", "restore", "of floor", "into fresh memory"],
        [
            [
                "bare disk, the faster way",
                f"{result['floor_write_mib_s']:.0f} MiB/s",
                "",
                f"{result['floor_read_mib_s']:.0f} MiB/s",
                "",
                "",
            ],
            *(
                [
                    codec.name.lower() + (" (chosen)" if codec is chosen else ""),
                    rate(codec, "save"),
                    f"{ratio('write', codec, 'save'):.2f}",
                    rate(codec, "restore"),
                    f"{ratio('read', codec, 'restore'):.2f}",
                    f"{ratio('read', codec, 'restore_fresh'):.2f}",
                ]
                for codec in Codec
            ),
        ],
    )
    show(
        f"compression {result['compression_ratio']:.2f}, a group of 8 stores its prompt {8 / dedup_ratio:.2f} times; "
        f"demo model: loading is faster from {crossing} tokens on",
        ["tokens", "prefill", "load"],
        [[r["tokens"], f"{1e3 * r['prefill_s']:.1f} ms", f"{1e3 * r['load_s']:.1f} ms"] for r in lengths],
    )
    save(json_path, result, quick=quick)


if __name__ == "__main__":
    main()
