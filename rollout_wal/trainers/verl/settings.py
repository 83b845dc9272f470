"""What of verl's configuration is for this project, and which names follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from ...errors import BadInput, problem

#: Versions of verl that this was read against and tested with.
SUPPORTED: Final = ("0.9",)
#: Batches are numbered by optimizer step and, within a step, by call: verl may sample more than once for one step.
CALLS_PER_STEP: Final = 1000


@dataclass(frozen=True, slots=True)
class Settings:
    """`actor_rollout_ref.rollout.custom.rollout_wal`.

    Args:
        path: the directory of the logs.
        run: names this run in the job; another name starts another run.
        host: name of the Ray actor.
        engine: factory of an EngineSpec, "module:callable"; None: the embedded engine.
        engine_options: its options: `device`, `dtype` and so on. Without any, the embedded engine runs on a CPU.
        workers, slots: of the backend.
        archive: a dataset folder that keeps every consumed rollout, which `rollout-wal trace` reads.
        detached: the host outlives verl's driver, and its rollouts go on meanwhile.
        shared: `path` is on a file system that every node sees.
        num_cpus, num_gpus: what Ray sets aside for the host and its workers.
        backend: further options of the `RolloutBackend`.

    Raises:
        BadInput: no `path`, or an option that does not exist.
    """

    path: str
    run: str = "verl"
    host: str = "rollout-wal"
    engine: str | None = None
    engine_options: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    slots: int = 32
    archive: str | None = None
    detached: bool = False
    shared: bool = False
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    backend: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rollout: Any) -> Settings:
        """From verl's rollout config, as OmegaConf or as its dataclass."""
        custom: Any = getattr(rollout, "custom", None) or {}
        raw = _plain(custom.get("rollout_wal") or {})
        known = {f.name for f in fields(cls)}
        wrong = sorted(set(raw) - known)
        if wrong or not raw.get("path"):
            raise BadInput(
                problem(
                    f"rollout.custom.rollout_wal has unknown options {wrong}"
                    if wrong
                    else "rollout.custom.rollout_wal.path is not set",
                    consequence="No rollout was begun",
                    remedy=f"Pass +actor_rollout_ref.rollout.custom.rollout_wal.OPTION=..., options: {sorted(known)}",
                )
            )
        return cls(**raw)

    def cohort(self, step: int, call: int) -> str:
        """The name of what is sampled in the `call`-th call for optimizer step `step`."""
        return f"{self.run}.0/{self.number(step, call)}"

    def evaluation(self, step: int, call: int) -> str:
        return f"{self.run}.0/eval/{step}.{call}"

    @staticmethod
    def number(step: int, call: int) -> int:
        if call >= CALLS_PER_STEP:
            raise BadInput(
                problem(
                    f"verl asked {call} times for rollouts of step {step}",
                    consequence="Nothing was sampled for this call",
                    remedy=f"Use larger generation batches: at most {CALLS_PER_STEP} calls a step are numbered",
                )
            )
        return step * CALLS_PER_STEP + call


def _plain(value: Any) -> Any:
    """OmegaConf's containers as the types they stand for."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        return value
    return [_plain(v) for v in value]
