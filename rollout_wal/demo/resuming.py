"""How long a resumed rollout waits for its next token: its context computed again, or its KV loaded."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engines.base import Engine, Request
from ..kv import KvConfig, Snapshots
from ..kv.data_files import data_files
from ..params import SamplingParams


@dataclass(frozen=True, slots=True)
class ResumeTime:
    """Medians, in seconds, from adding a rollout of so many tokens (prompt and output) to its next token."""

    tokens: int
    prefill_s: float
    load_s: float


def time_to_resume(model: Path, lengths: Sequence[int], folder: Path, *, repeat: int = 5) -> list[ResumeTime]:
    """Both ways in turn, with the embedded engine in this process, on one core, with a cold cache.

    Args:
        model: a model folder whose context is longer than the longest.
        folder: on the disk that is to be measured; nothing stays in it.
    """
    import torch

    from ..engines.hf import HFEngine

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = HFEngine.from_folder(model)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".resume-") as name:
            out = [_measure(engine, length, Path(name) / str(length), repeat) for length in lengths]
        engine.close()
        return out
    finally:
        torch.set_num_threads(threads)


def _measure(engine: Engine, length: int, folder: Path, repeat: int) -> ResumeTime:
    token_T = np.random.default_rng(length).integers(8, engine.info.vocab_size, length).astype(np.int32)
    # The last token is never in the cache: it is computed for its logits.
    saved, resumed = (
        Request(0, t, t[:0], t[:0].astype(np.bool_), SamplingParams(max_tokens=2), 1) for t in (token_T[:-1], token_T)
    )
    snapshots = Snapshots(KvConfig(str(folder)), engine, lambda _: True)

    def seconds(add: Callable[[], object]) -> float:
        start = time.perf_counter()
        add()
        while not len(engine.step().slot_N):
            pass
        return time.perf_counter() - start

    def load() -> None:
        loaded = snapshots.add(1, resumed).loaded
        if loaded != length - 1:
            raise RuntimeError(f"of {length - 1} tokens only {loaded} were loaded: this measures something else")

    prefill_s, load_s = [], []
    try:
        seconds(lambda: engine.add(saved))
        snapshots.save({1: 0})
        engine.abort(0)
        for _ in range(repeat + 1):
            prefill_s.append(seconds(lambda: engine.add(resumed)))
            engine.abort(0)
            for _, path in data_files(folder):
                _drop_cache(path)
            load_s.append(seconds(load))
            engine.abort(0)
    finally:
        snapshots.close()
    return ResumeTime(length, statistics.median(prefill_s[1:]), statistics.median(load_s[1:]))


def _drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
