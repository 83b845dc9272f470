"""`LiveConformance`: derive a test class from it, and pytest interrupts what `conformance_live_backend` makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import live_checks as checks
from .settings import Conformance


class LiveConformance:
    """What any backend owes that is submitted to, interrupted and collected from."""

    def test_uninterrupted(self, conformance_live_calm: checks.LiveRun, conformance_settings: Conformance) -> None:
        checks.each_once_live(conformance_live_calm, conformance_settings)

    @pytest.mark.parametrize("when", list(checks.LIVE_DEATHS), ids=lambda when: when.replace(" ", "-"))
    def test_interrupted(
        self,
        when: str,
        conformance_live_calm: checks.LiveRun,
        conformance_live_backend: Callable[[], checks.LiveBackend],
        conformance_settings: Conformance,
        conformance_live_keyed: bool,
    ) -> None:
        checks.live_survives(
            conformance_live_backend,
            conformance_settings,
            checks.LIVE_DEATHS[when],
            conformance_live_calm,
            keyed=conformance_live_keyed,
        )
