"""`EngineConformance`: derive a test class from it, and pytest runs every check on `conformance_engine`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...backend import EngineSpec
from ...engines.base import Engine
from ...errors import BadSampling
from . import engine_checks as checks
from .settings import Conformance


class EngineConformance:
    """What any `rollout_wal.engines.base.Engine` owes, whoever drives it."""

    def test_it_is_an_engine(self, conformance_engine: Engine, conformance_engine_spec: EngineSpec) -> None:
        assert isinstance(conformance_engine, Engine)
        info = conformance_engine.info
        assert info.vocab_size > 0
        assert info.max_context > 0
        for digest in (info.architecture_digest, info.weights_digest):
            assert len(digest) == 32
            assert digest == digest.lower()

    @pytest.mark.parametrize("sampling", list(checks.SAMPLINGS))
    def test_resume_equals_uninterrupted(
        self, conformance_engine: Engine, conformance_settings: Conformance, sampling: str
    ) -> None:
        try:
            checks.resume_equals_uninterrupted(
                conformance_engine, conformance_settings, checks.sampling_named(sampling, conformance_settings)
            )
        except BadSampling as refused:
            pytest.skip(f"the engine refuses them, which is honest: {refused}")

    @pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
    def test_it_keeps(self, check: checks.Check, conformance_engine: Engine, conformance_settings: Conformance) -> None:
        check(conformance_engine, conformance_settings)

    def test_weights_update(
        self, conformance_engine: Engine, conformance_engine_spec: EngineSpec, conformance_settings: Conformance
    ) -> None:
        if conformance_settings.other_weights is None:
            pytest.skip("Conformance.other_weights is not set: no other weights to change to")
        checks.weights_update(conformance_engine, conformance_settings, Path(conformance_engine_spec.model))
