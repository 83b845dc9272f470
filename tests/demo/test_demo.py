"""The main job, small: whole, and killed in the middle."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--prompts", "8", "--group-size", "4", "--hazard", "0.015", "--seed", "3"]
SMALL += ["--mean-length", "40", "--max-tokens", "100"]
VARIANTS = ("uninterrupted", "restart", "early_delivery", "wal", "regenerate")


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rollout_wal.cli", "demo", "--out", str(out), "--json", *SMALL]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def check(summary: dict[str, object], out: Path) -> None:
    variants = summary["variants"]
    assert isinstance(variants, dict)
    assert tuple(variants) == VARIANTS
    for v in variants.values():
        assert v["rollouts"] == 32
        assert {"mean_length", "interruptions", "lost_acknowledged_tokens", "tokens_recomputed", "seconds"} <= set(v)
    assert variants["wal"]["identical_to_uninterrupted"] is True
    assert variants["wal"]["lost_acknowledged_tokens"] == 0
    assert variants["wal"]["keyed"]["lost_acknowledged_tokens"] == 0
    assert variants["regenerate"]["identical_to_uninterrupted"] is True
    assert "predicted_mean_length" in variants["restart"]
    assert "predicted_mean_length" in variants["early_delivery"]
    kv = summary["kv_snapshots"]
    assert isinstance(kv, dict)
    assert kv["with"]["identical_to_uninterrupted"] is True, kv
    assert kv["without"]["tokens_loaded"] == 0
    assert [set(t) for t in kv["time_to_resume"]] == [{"tokens", "prefill_s", "load_s"}] * 2
    assert json.loads((out / "summary.json").read_text()) == summary
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "What KV snapshots save" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.timeout(600)
def test_the_demo_shows_the_bias_and_the_cure(tmp_path: Path) -> None:
    """Whole run, small: workers are killed, the log's output equals the uninterrupted run."""
    with start(tmp_path) as process:
        out, err = process.communicate(timeout=540)
    assert process.returncode == 0, err.decode()[-2000:]
    summary = json.loads(out)
    check(summary, tmp_path)
    assert summary["variants"]["wal"]["worker_deaths"] > 0
    assert summary["variants"]["wal"]["keyed"]["worker_deaths"] > 0
    assert summary["variants"]["restart"]["tokens_recomputed"] > 0
    kv = summary["kv_snapshots"]
    assert kv["with"]["snapshots"] > 0
    assert kv["with"]["tokens_loaded"] > 0
    assert kv["with"]["tokens_recomputed_per_resume"] < kv["without"]["tokens_recomputed_per_resume"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_demo_killed_at_random_moments_finishes_the_same_rollouts(tmp_path: Path) -> None:
    """SIGKILL of the demo itself, at moments spread over its whole run; the last life is left to end."""
    rng = random.Random(int(os.environ.get("ROLLOUT_WAL_SEED", "7")))
    reference = None
    done = tmp_path / "work" / "uninterrupted.npz"
    kills = 0
    for _ in range(int(os.environ.get("ROLLOUT_WAL_KILLS", "8"))):
        with start(tmp_path) as process:
            try:
                process.wait(timeout=rng.uniform(4.0, 16.0))
                break  # it was quicker than its killer
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        if reference is None and done.is_file():
            reference = done.read_bytes()
    with start(tmp_path) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()[-2000:]
    check(json.loads(out), tmp_path)
    assert kills > 0
    if reference is not None:  # what was finished before a kill was kept, not made again
        assert done.read_bytes() == reference
