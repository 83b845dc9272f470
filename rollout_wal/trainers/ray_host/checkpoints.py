"""What a trainer's checkpoint must hold of the cohorts that a host handed out, and the log brought to it.

A host keeps nothing of what was used for what: it may die between two steps. So the state is read back from the log,
where each batch is the cohort `TrainerLedger(run).cohort(number)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...backend import RolloutBackend
from ...params import SamplingParams
from ..ledger import TrainerLedger
from .gathering import SAMPLING

#: In a rollout's metadata: the optimizer step that it was sampled for.
STEP: Final = "step"


def ledger_of(backend: RolloutBackend, run: str, archive: str | None) -> TrainerLedger:
    return TrainerLedger(backend, run, archive=Path(archive) if archive else None, extras={"host": "ray"})


def state_of(backend: RolloutBackend, run: str, batches: int, step: int, archive: str | None) -> dict[str, Any]:
    """The state of a checkpoint that contains every batch below `batches`; see `TrainerLedger.state`.

    Args:
        step: the optimizer step that used a batch, where its metadata does not say it.
    """
    ledger = ledger_of(backend, run, archive)
    for name, count in backend.cohorts().items():
        number = name.removeprefix(ledger.cohort(0)[:-1])
        if number.isdecimal() and name == ledger.cohort(int(number)) and int(number) < batches:
            if count.gone == count.size:
                continue
            rollouts = sorted(backend.again(name), key=lambda r: r.index)
            raw = rollouts[0].metadata.get(SAMPLING)
            ledger.take(int(number), rollouts, SamplingParams.from_dict(raw) if raw else SamplingParams())
            ledger.used(int(number), int(rollouts[0].metadata.get(STEP, step)))
    return ledger.state(batches, step)


def restore(backend: RolloutBackend, run: str, state: Mapping[str, Any] | None, archive: str | None) -> None:
    """Consume what a durable checkpoint contains, and let evaluations go; see `TrainerLedger.restore`."""
    ledger_of(backend, run, archive).restore(state)
    for name, count in backend.cohorts().items():
        if name.startswith(f"{run}.0/eval/") and count.gone < count.size and not backend.in_flight(name):
            backend.release([r.id for r in backend.again(name)])
