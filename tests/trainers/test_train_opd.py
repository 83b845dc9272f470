"""The example is run as it stands: killed in the middle, it goes on from its checkpoint with the same rollouts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="needs the extra 'scoring'")

from rollout_wal.job_view import JobView

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_opd.py"


def life(out: Path, kill_after: str | None = None) -> list[str]:
    """The lines about batches that it prints until its end, or until it is killed."""
    command = [sys.executable, str(EXAMPLE), str(out)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("batch "):
                lines.append(line.partition(":")[0])
            if kill_after is not None and line.startswith(kill_after):
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert (process.returncode == 0) == (kill_after is None)
    return lines


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_it_goes_on(tmp_path: Path) -> None:
    assert life(tmp_path, "batch 2") == ["batch 0", "batch 1", "batch 2"]
    assert life(tmp_path) == ["batch 2", "batch 3", "batch 4", "batch 5"]  # a checkpoint contains the first two
    view = JobView(tmp_path / "wal")
    view.refresh()
    assert {c.record.name for c in view.job.cohorts.values()} == {f"opd.0/{i}" for i in range(6)}
    assert not view.job.rollouts, "all of them were consumed, and let go"
