"""What the examples of engines do: rollouts with a worker that is killed on the way, beside an undisturbed run."""

from __future__ import annotations

from pathlib import Path

from rollout_wal.backend import EngineSpec, RolloutBackend
from rollout_wal.params import SamplingParams

PROMPTS = [[1, 40 + i, 50 + 2 * i, 60 + 3 * i] for i in range(8)]
SAMPLING = SamplingParams(max_tokens=200, temperature=0.9, top_p=0.95)


def run(spec: EngineSpec, folder: Path, *, kill: bool) -> dict[str, list[int]]:
    """The tokens of each rollout."""
    with RolloutBackend(spec, folder, workers=1) as backend:
        out: dict[str, list[int]] = {}
        for rollout in backend.generate(PROMPTS, SAMPLING, group_size=4, cohort="step-0"):
            if kill and not out:
                backend.kill_worker("0")  # as a preemption without notice would
            out[rollout.key] = rollout.tokens.tolist()
        print(f"{len(out)} rollouts, {backend.stats.deaths} deaths, {backend.stats.resumed} resumed")
        print(f"begun = delivered + in flight + censored: {backend.balance().holds}")
    return out


def compare(spec: EngineSpec, folder: Path) -> None:
    """Both runs, each with a log of its own in this folder."""
    undisturbed = run(spec, folder / "wal-1", kill=False)
    killed = run(spec, folder / "wal-2", kill=True)
    print(f"the same tokens: {undisturbed == killed}")
