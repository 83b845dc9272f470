"""Planning and loading: what they cost, beside a memory copy, zstandard itself and three other libraries.

    python -m benchmarks.payload [--quick] [--only plan,load,memory,peers] [--json FILE]

With `--only`, the other sections' figures in FILE are kept. Loading is measured from a warm page cache, so that the
loader and not the disk is what is measured, and after the first steps, so that its memory is not fresh either.
"Delivered" means: in memory that the rank has mapped, announced, taken and let go.

Baselines. `memcpy`: between two warm arrays of 256 MiB, by as many threads as the reader has processes (`memcpy_1`: by
one). `zstandard`: the library on the same record batches, in memory, by one thread. What the reader does with one
process, where that is like for like, is named `_1_process`. The headline is a node of 8 data ranks (33 MB per step);
`small_steps` are those of 2 ranks (8 MB), where the cost of a step that does not depend on its size shows.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import zstandard

from rollout_wal.dataset import PlanSpec, Sample, open_dataset, plan
from rollout_wal.dataset.loader import Loader

from . import _payload_data as data
from . import _payload_peers as peers
from ._common import save, show

GROUPS = ("tokens", data.TEACHER_GROUP)
#: Plans by compression and number of ranks.
Plans = dict[tuple[str, int], Path]


def plan_bytes_ratio(folder: Path) -> float:
    """Bytes that planning fetches from storage, with nothing cached, over the bytes of the dataset."""
    dataset = open_dataset(folder)
    spec = PlanSpec(token_budget=data.BUDGET, ranks=2)
    plan(dataset, spec)  # everything that Python imports on the way is cached now
    files = [folder / e.path for e in dataset.state.files()]
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    before = _bytes_read()
    plan(open_dataset(folder), spec)
    return (_bytes_read() - before) / sum(path.stat().st_size for path in files)


def _bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


_PLAN_MANY = """
import json, resource, sys, time
from rollout_wal.dataset import PlanSpec, Sample, open_dataset, plan
began = time.perf_counter()
made = plan(open_dataset(sys.argv[1]), PlanSpec(token_budget=int(sys.argv[2]), ranks=8, bins_per_rank=2, seed=1))
seconds = time.perf_counter() - began
report = made.report
print(json.dumps({"seconds": seconds, "planned": report.planned, "packing_fill": report.packing_fill,
                  "rank_imbalance": report.rank_imbalance, "steps": report.steps,
                  "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def plan_many(folder: Path, count: int) -> dict[str, Any]:
    """Plan `count` samples in a fresh process: open, read metadata, shuffle, pack, balance."""
    data.seal_metadata_only(folder, count)
    done = subprocess.run(
        [sys.executable, "-c", _PLAN_MANY, str(folder), str(data.BUDGET)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"samples_per_s": found["planned"] / found["seconds"]}


PROCESSES = min(4, len(os.sched_getaffinity(0)))
NODE_RANKS, FEW_RANKS = 8, 2
_COPY_BYTES = 1 << 28
_PAIRS = 5
#: For the loader: four steps of 8 ranks.
_MEMORY_BYTES = 1 << 27


def memcpy_gb_per_s(threads: int) -> float:
    """Copies between two warm arrays: the C library's memcpy, without the interpreter's lock."""
    source, target = np.ones(_COPY_BYTES, dtype=np.uint8), np.zeros(_COPY_BYTES, dtype=np.uint8)
    part = _COPY_BYTES // threads
    took = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(
                pool.map(
                    lambda n: ctypes.memmove(target.ctypes.data + n * part, source.ctypes.data + n * part, part),
                    range(threads),
                )
            )
            took.append(time.perf_counter() - began)
    return _COPY_BYTES / statistics.median(took) / 1e9


def loader_gb_per_s(folder: Path, plan_path: Path, ranks: int, processes: int) -> float:
    """What the warm reader delivers to a rank that does nothing."""
    for path in folder.rglob("*.arrow"):
        path.read_bytes()  # some systems reclaim page cache that was not used for a minute
    # Long enough for every page of the memory to have been used: the first use of one takes ten times as long.
    warm_up, delivered, began = 10, 0, 0.0
    with Loader(
        folder, plan_path, name=uuid.uuid4().hex, groups=GROUPS, local_ranks=1, data_ranks=tuple(range(ranks)),
        memory_bytes_max=_MEMORY_BYTES, prefetch_max=2, reader_processes=processes,
    ) as loader:  # fmt: skip
        assert loader.steps > warm_up + 1
        for batch in loader:
            if batch.step == warm_up:
                began, delivered = time.perf_counter(), 0
            delivered += batch.nbytes
        return delivered / (time.perf_counter() - began) / 1e9


class ZstandardItself:
    """The payload of an uncompressed dataset, compressed record batch by record batch as Arrow's default does it."""

    def __init__(self, folder: Path) -> None:
        dataset = open_dataset(folder)
        compressor = zstandard.ZstdCompressor(level=1)
        self._frames, self._bytes = [], 0
        for group in GROUPS:
            places = dataset.locations(group)
            for file, name in enumerate(places["files"]):
                raw = (folder / name).read_bytes()
                of_file = places["file"] == file
                offsets, first = np.unique(places["offset"][of_file], return_index=True)
                for offset, size in zip(offsets.tolist(), places["bytes"][of_file][first].tolist(), strict=True):
                    self._frames.append(compressor.compress(raw[offset : offset + size]))
                    self._bytes += size

    def gb_per_s(self) -> float:
        decompressor = zstandard.ZstdDecompressor()
        began = time.perf_counter()
        for frame in self._frames:
            decompressor.decompress(frame)
        return self._bytes / (time.perf_counter() - began) / 1e9


def load(root: Path, plans: Plans) -> dict[str, Any]:
    """Each figure beside its baseline, in pairs; medians, and medians of the pairs' ratios."""
    own = ZstandardItself(root / "none")
    result: dict[str, Any] = {"reader_processes": PROCESSES}
    cases = {
        "loader": ("none", NODE_RANKS, PROCESSES, "memcpy"),
        "loader_1_process": ("none", NODE_RANKS, 1, "memcpy_1"),
        "loader_small_steps": ("none", FEW_RANKS, PROCESSES, "memcpy"),
        "loader_zstd": ("zstd", NODE_RANKS, PROCESSES, "zstandard"),
        "loader_zstd_1_process": ("zstd", NODE_RANKS, 1, "zstandard"),
        "loader_zstd_small_steps": ("zstd", FEW_RANKS, PROCESSES, "zstandard"),
    }
    baselines = {
        "memcpy": lambda: memcpy_gb_per_s(PROCESSES),
        "memcpy_1": lambda: memcpy_gb_per_s(1),
        "zstandard": own.gb_per_s,
    }
    seen: dict[str, list[float]] = {}
    for _ in range(_PAIRS):  # interleaved: both sides meet the machine's slow spells
        for name, (compression, ranks, processes, baseline) in cases.items():
            floor = baselines[baseline]()
            found = loader_gb_per_s(root / compression, plans[compression, ranks], ranks, processes)
            seen.setdefault(f"{baseline}_gb_per_s", []).append(floor)
            seen.setdefault(f"{name}_gb_per_s", []).append(found)
            seen.setdefault(f"{name}_ratio_to_{baseline}", []).append(found / floor)
    result |= {name: statistics.median(values) for name, values in seen.items()}
    result["load_average"] = os.getloadavg()[0]
    return result


_RANK = """
import sys
import numpy as np
from rollout_wal.dataset.loader import Loader
folder, plan, name, rank, ranks = sys.argv[1:]
print("idle", flush=True); sys.stdin.readline()
loader = Loader(folder, plan, name=name, groups=("tokens", "teacher.math"), local_rank=int(rank),
                local_ranks=int(ranks), data_rank=0, data_ranks=(0,), memory_bytes_max=1 << 30, prefetch_max=1)
batch = loader.next()
total = 0
for sample in batch.samples:
    for group in ("tokens", "teacher.math"):
        row = sample.group(group)
        for column in row:
            values = row[column]
            total += int(np.asarray(getattr(values, "values", values)).reshape(-1).view(np.uint8)[::512].sum())
print(loader.reader_pid, flush=True); sys.stdin.readline()
"""


def node_memory(folder: Path, plan_path: Path, ranks: int) -> int:
    """PSS of all ranks and the reader while a step is held and read, above that of the same ranks idle; bytes."""
    name = uuid.uuid4().hex
    command = [sys.executable, "-c", _RANK, str(folder), str(plan_path), name]
    running = [
        subprocess.Popen([*command, str(r), str(ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]
    try:
        _lines(running)
        idle = sum(_pss(p.pid) for p in running)
        for process in running:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        reader = int(_lines(running)[0])
        helpers = [child.pid for child in psutil.Process(reader).children()]
        return sum(_pss(pid) for pid in [*(p.pid for p in running), reader, *helpers]) - idle
    finally:
        for process in running:
            process.communicate()


def _lines(running: list[subprocess.Popen[str]]) -> list[str]:
    return [p.stdout.readline() for p in running if p.stdout is not None]


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def ours_samples_per_s(folder: Path, plan_path: Path) -> float:
    """One epoch through the loader, reading and touching what the peers do; the start of the reader included."""
    began = time.perf_counter()
    count = 0
    with Loader(
        folder, plan_path, name=uuid.uuid4().hex, groups=GROUPS, local_ranks=1, data_ranks=(0,),
        memory_bytes_max=1 << 28,
    ) as loader:  # fmt: skip
        started = time.perf_counter() - began
        for batch in loader:
            for sample in batch.samples:
                tokens, teacher = sample.tokens, sample.group(data.TEACHER_GROUP)
                assert teacher is not None
                logprobs = tokens["logprobs"]
                arrays = [tokens["token_ids"], tokens["loss_mask"], getattr(logprobs, "values", logprobs)]
                peers.touch([*arrays, teacher["topk_ids"]])
                count += 1
    return count / (time.perf_counter() - began - started)


def prepare(root: Path, count: int, compressions: Sequence[str]) -> tuple[list[Sample], Plans]:
    """The same samples with and without compression, and plans for one rank, two and eight."""
    members = list(data.samples(count))
    plans = {}
    for compression in compressions:
        data.seal(root / compression, members, compression)
        for ranks in (1, FEW_RANKS, NODE_RANKS):
            plans[compression, ranks] = root / f"{compression}-{ranks}.arrow"
            spec = PlanSpec(token_budget=data.BUDGET, ranks=ranks, bins_per_rank=2)
            plan(open_dataset(root / compression), spec).write(plans[compression, ranks])
    return members, plans


def section_plan(root: Path, quick: bool) -> dict[str, Any]:
    prepare(root, 400 if quick else 1600, ["none"])
    many = plan_many(root / "many", 1_000_000 if quick else 10_000_000)
    names = {"planned": "plan_samples", "seconds": "plan_seconds", "peak_rss_gib": "plan_peak_rss_gib"}
    result: dict[str, Any] = {"plan_bytes_ratio": plan_bytes_ratio(root / "none")}
    result |= {new: many[old] for old, new in names.items()}
    result |= {"plan_samples_per_s": many["samples_per_s"]}
    return result | {name: many[name] for name in ("packing_fill", "rank_imbalance")} | whole_groups(root / "none")


def whole_groups(folder: Path) -> dict[str, Any]:
    """How full the rows are when no group of eight is split across steps."""
    spec = PlanSpec(token_budget=data.BUDGET, ranks=NODE_RANKS, bins_per_rank=2, whole_groups=True)
    report = plan(open_dataset(folder), spec).report
    assert report is not None
    return {"whole_groups_packing_fill": report.packing_fill, "whole_groups_rank_imbalance": report.rank_imbalance}


def section_load(root: Path, quick: bool) -> dict[str, Any]:
    members, plans = prepare(root, 1600 if quick else 9600, ["none", "zstd"])
    return {"samples": len(members), "tokens": sum(s.length for s in members)} | load(root, plans)


def section_memory(root: Path, quick: bool) -> dict[str, Any]:
    members, _ = prepare(root, 400 if quick else 1600, ["none"])
    big_step = root / "big-step.arrow"
    bins = max(1, sum(s.length for s in members) // data.BUDGET // 3)
    plan(open_dataset(root / "none"), PlanSpec(token_budget=data.BUDGET, bins_per_rank=bins)).write(big_step)
    one, eight = (node_memory(root / "none", big_step, ranks) for ranks in (1, 8))
    result: dict[str, Any] = {"node_memory_bytes_1_rank": one, "node_memory_bytes_8_ranks": eight}
    return result | {"node_memory_ratio_8_ranks": eight / one}


def section_peers(root: Path, quick: bool) -> dict[str, Any]:
    members, plans = prepare(root, 400 if quick else 1600, ["none", "zstd"])
    order = np.random.default_rng(0).permutation(len(members))
    seen: dict[str, list[float]] = {}
    result: dict[str, Any] = {"peers_samples": len(members)}
    for turn in range(3):  # interleaved
        folder = root / f"peers-{turn}"
        folder.mkdir()
        mosaic, why = peers.mosaic_streaming(members, folder, order)
        found = {
            "ours": ours_samples_per_s(root / "none", plans["none", 1]),
            "ours_zstd": ours_samples_per_s(root / "zstd", plans["zstd", 1]),
            "datasets": peers.hugging_face(members, folder, order),
            "torch_save": peers.torch_save(members, folder, order),
            "mosaicml_streaming": mosaic,
        }
        for name, value in found.items():
            if value is not None:
                seen.setdefault(f"{name}_samples_per_s", []).append(value)
        if why:
            result["mosaicml_streaming_absent"] = why
    return result | {name: statistics.median(values) for name, values in seen.items()}


SECTIONS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "plan": section_plan,
    "load": section_load,
    "memory": section_memory,
    "peers": section_peers,
}


@click.command()
@click.option("--quick", is_flag=True, help="Fewer samples; a minute or two instead of several.")
@click.option("--only", default=",".join(SECTIONS), help="Sections, with commas between them.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
def main(quick: bool, only: str, json_path: Path | None) -> None:
    """Measure planning and loading."""
    names = only.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise click.UsageError(f"no sections {sorted(unknown)}; there are {list(SECTIONS)}")
    result: dict[str, Any] = {}
    if json_path is not None and json_path.exists() and set(names) != set(SECTIONS):
        result = json.loads(json_path.read_text())
        if "peers" in names:
            result.pop("mosaicml_streaming_absent", None)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="payload-benchmark-") as root:
            result |= SECTIONS[name](Path(root), quick)
    for stamp in ("date", "quick", "hardware"):
        result.pop(stamp, None)
    show("payload", ["figure", "value"], [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in result.items()])
    save(json_path, result, quick=quick)


if __name__ == "__main__":
    main()
