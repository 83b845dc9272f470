"""The host that verl's configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...backend.spec import EngineSpec
from ..ray_host import start_host
from .settings import Settings


def host_of(settings: Settings, model: str) -> Any:
    """Ray's handle of the host, started if there is none.

    Args:
        model: a local model folder; its weights are the first policy version in a new job.
    """
    spec = EngineSpec(model, options={"max_batch": settings.slots, **settings.engine_options})
    if settings.engine is not None:
        spec = replace(spec, factory=settings.engine)
    return start_host(
        spec,
        settings.path,
        name=settings.host,
        detached=settings.detached,
        shared=settings.shared,
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        workers=settings.workers,
        slots=settings.slots,
        **settings.backend,
    )
