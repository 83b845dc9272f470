"""The five variants, each run to its end and kept on disk, so that a demo that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import EngineSpec, RolloutBackend
from ..kv import KvConfig
from ..params import SamplingParams
from ..prompts import rollout_seed
from ..testing.witness import Witness
from .baseline import Baseline, Mode
from .killer import BackendKiller, KillSchedule
from .resuming import ResumeTime, time_to_resume
from .tasks import Prompts


@dataclass(frozen=True, slots=True)
class Plan:
    """What all variants have in common."""

    prompts: int = 150
    group_size: int = 8
    workers: int = 2
    slots: int = 24
    mean_length: float = 90.0
    max_tokens: int = 400
    hazard: float = 1 / 150
    lag: int = 20
    kv_every: int = 16
    """Tokens between two snapshots of a rollout's KV, in the variant that keeps them."""
    seed: int = 0

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group_size


@dataclass(slots=True)
class Result:
    """One variant, done. `token_F` holds all outputs end to end in the order of the rollouts' indexes."""

    length_N: NDArray[np.int64]
    token_F: NDArray[np.int32]
    interruptions: int
    interrupted_rollouts: int
    deaths: int
    lost_acknowledged_tokens: int
    tokens_recomputed: int
    seconds: float
    balance: str = ""
    resumed: int = 0
    """Attempts that went on after a death."""
    tokens_loaded: int = 0
    """Output tokens whose KV came from a snapshot."""
    snapshots: int = 0
    seconds_resuming: float = 0.0
    """From each death until its rollouts were submitted again, summed over rollouts."""
    seconds_loading: float = 0.0
    """What reading snapshots took, summed over rollouts."""
    kv_fallbacks: dict[str, int] = field(default_factory=dict)

    def save(self, folder: Path, name: str) -> None:
        """Whole or not at all."""
        temporary = folder / f".{name}.npz"
        plain = {k: v for k, v in asdict(self).items() if k not in ("length_N", "token_F")}
        with temporary.open("wb") as file:
            np.savez(file, length_N=self.length_N, token_F=self.token_F, plain=np.asarray(json.dumps(plain)))
        os.replace(temporary, folder / f"{name}.npz")

    @classmethod
    def load(cls, folder: Path, name: str) -> Result | None:
        path = folder / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as data:
            return cls(data["length_N"], data["token_F"], **json.loads(str(data["plain"])))


class Variants:
    """Runs variants on one model and one set of prompts."""

    def __init__(self, plan: Plan, model: Path, prompts: Prompts, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self._model = model
        self._prompts = prompts
        self.sampling = SamplingParams(max_tokens=plan.max_tokens)
        self.schedule = KillSchedule(plan.hazard, plan.seed)
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, name: str, run: Callable[[str], Result]) -> Result:
        """The result of a variant: the one that was kept, or of running it now."""
        result = Result.load(self.folder, name)
        if result is None:
            result = run(name)
            result.save(self.folder, name)
            shutil.rmtree(self.folder / f"{name}.wal", ignore_errors=True)
        return result

    def with_log(self, name: str, *, noise: Any, kills: bool, kv: bool = False) -> Result:
        """RolloutBackend, with or without kills and KV snapshots. Its log is what a killed demo goes on from."""
        plan, started = self.plan, time.monotonic()
        path = self.folder / f"{name}.wal"
        outputs: dict[int, NDArray[np.int32]] = {}
        interruptions: dict[int, int] = {}
        with (
            Witness(self.folder / f"{name}.sock") as witness,
            RolloutBackend(
                self._model,
                path,
                workers=plan.workers,
                slots=plan.slots,
                segment_bytes=1 << 20,
                witness=str(witness.path),
                kv=KvConfig(str(path / "kv"), every_tokens=plan.kv_every) if kv else None,
            ) as backend,
        ):
            killer = BackendKiller(backend, self.schedule) if kills else None
            if killer is not None:
                killer.start()
            for rollout in backend.generate(
                self._prompts.tokens,
                self.sampling,
                group_size=plan.group_size,
                seed=plan.seed,
                cohort="demo",
                noise=noise,
                progress=True,
            ):
                outputs[rollout.index] = rollout.tokens
                interruptions[rollout.index] = rollout.interruptions
                witness.expect(rollout.id, rollout.tokens)
            if killer is not None:
                killer.stop()
            stats, balance = backend.stats, backend.balance()
            result = _result(
                outputs,
                interruptions=sum(interruptions.values()),
                interrupted_rollouts=sum(n > 0 for n in interruptions.values()),
                deaths=stats.deaths,
                lost=witness.lost(),
                recomputed=stats.tokens_prefilled,
                seconds=time.monotonic() - started,
                balance=f"{balance}{'' if balance.holds else '  ** DOES NOT HOLD **'}",
            )
            return replace(
                result,
                resumed=stats.resumed,
                tokens_loaded=stats.tokens_loaded,
                snapshots=stats.snapshots,
                seconds_resuming=stats.seconds_resuming,
                seconds_loading=stats.seconds_loading,
                kv_fallbacks=dict(stats.kv_fallbacks),
            )

    def resume_times(self, lengths: list[int]) -> list[ResumeTime]:
        """How long a resumed rollout of so many tokens waits for its next token."""
        path = self.folder / "resume.json"
        if not path.is_file():
            times = time_to_resume(self._model, lengths, self.folder)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps([asdict(t) for t in times]))
            os.replace(temporary, path)
        return [ResumeTime(**t) for t in json.loads(path.read_text())]

    def baseline(self, name: str, *, mode: Mode, tick: Callable[[int], None]) -> Result:
        """What others do."""
        plan, started = self.plan, time.monotonic()
        spec = EngineSpec(str(self._model), options={"max_batch": plan.slots})
        baseline = Baseline(
            spec,
            self.folder / f"{name}.wal",
            mode=mode,
            workers=plan.workers,
            slots=plan.slots,
            lag=plan.lag,
            schedule=self.schedule,
        )
        prompts = [p for p in self._prompts.tokens for _ in range(plan.group_size)]
        seeds = [rollout_seed(plan.seed, i) for i in range(len(prompts))]
        out = baseline.run(prompts, seeds, self.sampling, tick=tick)
        return _result(
            {i: np.asarray(t, np.int32) for i, t in out.tokens.items()},
            interruptions=out.interruptions,
            interrupted_rollouts=out.interrupted_rollouts,
            deaths=out.deaths,
            lost=out.tokens_lost,
            recomputed=out.tokens_recomputed,
            seconds=time.monotonic() - started,
        )


def _result(
    outputs: dict[int, NDArray[np.int32]],
    *,
    interruptions: int,
    interrupted_rollouts: int,
    deaths: int,
    lost: int,
    recomputed: int,
    seconds: float,
    balance: str = "",
) -> Result:
    ordered = [outputs[i] for i in sorted(outputs)]
    return Result(
        np.asarray([len(t) for t in ordered], np.int64),
        np.concatenate(ordered).astype(np.int32),
        interruptions,
        interrupted_rollouts,
        deaths,
        lost,
        recomputed,
        seconds,
        balance,
    )
