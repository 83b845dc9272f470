"""The project's own backend, audited: really killed, through the adapter and through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rollout_wal.audit.adapters.log import LogBackend
from rollout_wal.audit.backends import AuditableBackend, identical_rollouts, run_backend
from rollout_wal.audit.command import audit
from rollout_wal.backend import PoisonRule, RolloutBackend
from rollout_wal.errors import BadPrompt
from rollout_wal.params import SamplingParams
from rollout_wal.testing.conformance import live_checks
from rollout_wal.testing.conformance.settings import Conformance
from rollout_wal.testing.tiny_models import make_tiny_model

PROMPTS = [[1, 40 + i, 50 + 2 * i] for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=40.0)


def test_the_adapter_delivers_what_an_uninterrupted_run_would(model: Path, tmp_path: Path) -> None:
    settings = Conformance(prompts=tuple(map(tuple, PROMPTS)), max_tokens=120)
    sampling = SamplingParams(max_tokens=120)
    with RolloutBackend(model, tmp_path / "wal", segment_bytes=1 << 20, poison=PoisonRule(deaths=1000)) as backend:
        names = iter(("calm", "hit", "again", "bad"))

        def start() -> LogBackend:
            adapter = LogBackend(backend, noise="position", name=next(names))
            assert isinstance(adapter, AuditableBackend)
            return adapter

        calm = live_checks.run_live(start, settings)
        live_checks.live_survives(start, settings, live_checks.LIVE_DEATHS["again and again"], calm, keyed=True)
        adapter = start()
        try:
            run = run_backend(adapter, PROMPTS, sampling, copies=4)
        finally:
            adapter.close()
        assert backend.balance().holds
        assert run.table.failure_N is not None
        assert (run.table.failure_N == -1).all()
        assert identical_rollouts(run, run) == (24, 24)
        bad = start()
        try:
            with pytest.raises(BadPrompt, match="vocabulary"):
                run_backend(bad, [[100_000]], sampling, timeout_seconds=20)
        finally:
            bad.close()


@pytest.mark.slow
def test_the_command_audits_the_log(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    arguments = [
        "run",
        "log",
        "--model",
        str(model),
        "--prompts",
        str(prompts),
        "--copies",
        "10",
        "--max-tokens",
        "100",
    ]
    arguments += ["--interrupt-every", "0.3", "--noise", "position", "--json"]
    result = CliRunner().invoke(audit, arguments)
    assert result.exit_code == 0, result.output
    cell = json.loads(result.stdout)["cells"][0]
    assert cell["rollouts"] == 60
    assert cell["interrupted_share"] > 0
    assert cell["mean_delta_relative"] == 0
    verdicts = {h["name"]: h["verdict"] for h in cell["hypotheses"]}
    assert verdicts["H1"] == verdicts["H3"] == "held"
