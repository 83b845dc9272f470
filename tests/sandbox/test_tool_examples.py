"""What the docs and the examples show of tools is run as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from rollout_wal.dataset import open_dataset
from rollout_wal.testing.tiny_models import make_tiny_model
from sandbox_log.backends.local import remove_tree
from sandbox_log.events import Kind
from sandbox_log.log import SandboxLog

HERE = Path(__file__).resolve().parents[2]


def test_the_example_of_tool_rollouts(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(HERE / "examples" / "tool_rollouts.py"))["main"]
    main([str(ground), "--max-tokens", "50"])
    said = capsys.readouterr().out
    assert "4 rollouts, " in said
    calls = int(re.findall(r"4 rollouts, (\d+) calls", said)[0])
    assert calls >= 2
    assert sum(int(n) for n in re.findall(r": (\d+) turns", said)) <= calls
    notes = list((ground / "boxes").glob("notes-*/workspace/notes"))
    assert sum(len(path.read_text().splitlines()) for path in notes) == calls, "each command ran once"
    with SandboxLog(ground / "sandboxes", readonly=True) as log:
        outcomes = [e for box in log.sandboxes() for e in log.events(box.sandbox_id) if e.kind is Kind.OUTCOME]
        assert len(outcomes) == calls
    assert open_dataset(ground / "data").num_samples == 4


def test_the_docs_show_code_that_runs(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (HERE / "docs" / "backend.md").read_text()
    section = page[page.index("## Tools") :]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    monkeypatch.chdir(ground)
    names: dict[str, Any] = {"model": make_tiny_model(ground / "model", mean_length=30.0), "prompts": [[1, 50, 60]]}
    exec(compile(code, "docs/backend.md", "exec"), names)
    assert len(names["rollouts"]) == 8
    remove_tree(ground / "runs")
