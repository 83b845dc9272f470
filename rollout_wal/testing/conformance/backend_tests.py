"""`BackendConformance`: derive a test class from it, and pytest kills the worker of `conformance_backend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ...backend import EngineSpec
from ...engines.base import Engine
from . import backend_checks as checks
from .settings import Conformance

#: Enough to find a backend that does not resume, delivers early or loses an end. The others are marked slow.
_QUICK = ("between append and durable", "end of sequence durable, not delivered", "again and again")


def _deaths() -> list[Any]:
    return [
        pytest.param(lives, id=name.replace(" ", "-"), marks=() if name in _QUICK else pytest.mark.slow)
        for name, lives in checks.DEATHS.items()
    ]


class BackendConformance:
    """What `RolloutBackend` owes with any engine."""

    @pytest.mark.parametrize("lives", _deaths())
    def test_killed(self, conformance_backend: checks.KilledBackend, lives: tuple[tuple[str, int], ...]) -> None:
        checks.survives(conformance_backend, lives)

    def test_fresh_noise_keeps_what_was_shown(self, conformance_backend: checks.KilledBackend) -> None:
        checks.fresh_noise_keeps_what_was_shown(conformance_backend)

    @pytest.mark.slow
    @pytest.mark.parametrize("moment", checks.UPDATE_DEATHS)
    def test_killed_during_an_update(
        self,
        moment: str,
        conformance_engine: Engine,
        conformance_engine_spec: EngineSpec,
        conformance_settings: Conformance,
        conformance_backend_options: dict[str, Any],
        conformance_folder: Path,
    ) -> None:
        if conformance_settings.other_weights is None:
            pytest.skip("Conformance.other_weights is not set: no other weights to change to")
        with checks.KilledBackend(
            conformance_engine_spec, conformance_folder, conformance_settings, conformance_backend_options
        ) as backend:
            checks.update_survives(backend, conformance_engine, moment, Path(conformance_engine_spec.model))
