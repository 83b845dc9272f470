"""An engine for a worker that dies while KV is saved, loaded or collected, and that knows wrong KV when it is given it.

The worker kills itself with SIGKILL, at a call that its life chose beforehand: so every life dies where it hurts, and
not mostly between. What happened is written to a folder: `life-N`, `killed-N-PHASE-WHERE`, `wrong-N`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rollout_wal.engines.base import Request
from rollout_wal.engines.hf import HFEngine
from rollout_wal.kv import KvArrays, collect, data_files, index, loader, reader, writer
from rollout_wal.params import SamplingParams

PHASES = ("save", "load", "collect", "anywhere")


class SuspiciousEngine(HFEngine):
    """Computes what it is given for itself, and notes what is not that."""

    journal: Path
    life: int
    reference: HFEngine

    def add_with_kv(self, request: Request, kv: KvArrays) -> None:
        token_T = np.concatenate((request.prompt, request.prefix))
        right = np.array_equal(token_T[: len(kv)], kv.token_T) and self._agrees(kv)
        if not right:
            (self.journal / f"wrong-{self.life}").touch()
        super().add_with_kv(request, kv)

    def _agrees(self, kv: KvArrays) -> bool:
        asked = np.concatenate((kv.token_T, [9])).astype(np.int32)
        none = np.empty(0, np.int32)
        self.reference.add(Request(0, asked, none, none.astype(np.bool_), SamplingParams(max_tokens=5), 1))
        while self.reference.kv_tokens(0) < len(kv):
            self.reference.step()
        own = self.reference.save_kv(0)
        self.reference.abort(0)
        assert own is not None
        return all(
            np.allclose(a[:, : len(kv)].view(np.float32), b.view(np.float32), atol=1e-3)
            for a, b in zip(own.parts, kv.parts, strict=True)
        )


def build(model: str, policy_version: int = 0, *, journal: str, lives: int, seed: int, **options: Any) -> HFEngine:
    """The first `lives` workers die; the next ones do not."""
    folder = Path(journal)
    life = len(list(folder.glob("life-*")))
    (folder / f"life-{life}").touch()
    engine = SuspiciousEngine.from_folder(model, policy_version=policy_version, **options)
    assert isinstance(engine, SuspiciousEngine)
    engine.journal, engine.life = folder, life
    engine.reference = HFEngine.from_folder(model, policy_version=policy_version, **options)
    if life < lives:
        _plan_death(folder, life, random.Random(seed * 1000 + life))
    return engine


def _plan_death(folder: Path, life: int, rng: random.Random) -> None:
    phase = PHASES[life % len(PHASES)]

    def die(where: str) -> None:
        (folder / f"killed-{life}-{phase}-{where}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def later(seconds: float) -> None:
        time.sleep(seconds)
        die("timer")

    # Also where the call does not come: too little to load, or no garbage.
    seconds = rng.uniform(0.0, 0.25) if phase == "anywhere" else 0.5
    threading.Thread(target=later, args=(seconds,), daemon=True).start()

    left = rng.randint(1, 6)
    lock = threading.Lock()

    def fatal(function: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Counts; the last call is cut: before, in the middle or after."""

        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if not last:
                return function(*args, **keywords)
            done = None
            when = rng.choice(("before", "after", *(["within"] if half else [])))
            if when == "within" and half is not None:
                half(*args)
            elif when == "after":
                done = function(*args, **keywords)
            die(f"{function.__name__}-{when}")
            return done

        return call

    def half_written(fd: int, data: memoryview, offset: int) -> None:
        data_files.write_at(fd, data[: len(data) // 8192 * 4096], offset)

    match phase:
        case "save":
            _patch(writer, "write_at", fatal(writer.write_at, half_written))
            _patch(index.Index, "complete", fatal(index.Index.complete))
            _patch(writer.DataWriter, "sync", fatal(writer.DataWriter.sync))
        case "load":
            _patch(reader, "read_at", fatal(reader.read_at))
            _patch(loader, "unpack_tokens", fatal(loader.unpack_tokens))
        case "collect":
            left = rng.randint(1, 4)
            for name in ("drop", "drop_unreferenced", "drop_file", "move", "blocks_in"):
                _patch(index.Index, name, fatal(getattr(index.Index, name)))
            _patch(collect, "_abandoned", fatal(collect._abandoned))
            _patch(Path, "unlink", fatal(Path.unlink))


def _patch(where: Any, name: str, function: Any) -> None:
    setattr(where, name, function)
