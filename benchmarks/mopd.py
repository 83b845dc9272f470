"""Multi-teacher on-policy distillation: killed, unkilled and restarted from scratch, over seeds.

    python -m benchmarks.mopd --arms killed --json benchmarks/results/mopd_demo.json
    python -m benchmarks.mopd --short --json benchmarks/results/mopd.json

A run of one arm, objective and seed takes minutes; those that are finished in --work are kept, so the same command goes
on after an interruption, and what was run is what the result says. Runs are as long as the demonstration's and are
killed as often; with --short they are about half as long (see _SHORT), so that all arms over five seeds fit in an
evening. The arms of a seed share problems and noise, the killed ones the schedule of kills too. Intervals are Student's
t at 95 % over seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from scipy import stats

from benchmarks._common import save, show
from rollout_wal.trainers.mopd.config import ARMS, OBJECTIVES, Arm, Objective, School, StudentConfig
from rollout_wal.trainers.mopd.results import summarise
from rollout_wal.trainers.mopd.run import make_models, run_student
from rollout_wal.trainers.mopd.tasks import DOMAINS

#: What --short changes: batches instead of the demonstration's 40, and about as few kills in proportion.
_SHORT: dict[Objective, dict[str, Any]] = {
    "sampled": {"batches": 32, "trainer_kills": 1, "server_kills": 1},
    "full_vocabulary": {"batches": 16, "trainer_kills": 1, "server_kills": 1},
}
_QUICK: dict[str, Any] = {
    "batches": 4,
    "rollouts": 64,
    "token_budget": 300,
    "held_out": 40,
    "evaluate_every": 2,
    "trainer_kills": 1,
}
_QUICK |= {"server_kills": 1, "hazard": 0.02}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and its 95 % interval where there is more than one value."""
    mean, n = float(np.mean(values)), len(values)
    found: dict[str, Any] = {"mean": mean, "n": n, "values": list(values)}
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
        found |= {"low": mean - half, "high": mean + half}
    return found


def aggregate(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each arm and objective that was run."""
    out = []
    for objective in OBJECTIVES:
        for arm in ARMS:
            mine = [r for r in runs if (r["config"]["arm"], r["config"]["objective"]) == (arm, objective)]
            if not mine:
                continue
            entry: dict[str, Any] = {"arm": arm, "objective": objective, "seeds": [r["config"]["seed"] for r in mine]}
            for domain in DOMAINS:
                entry[domain] = {
                    "accuracy": interval([r["domains"][domain]["after"] for r in mine]),
                    "share_of_specialist": interval([r["domains"][domain]["share_of_specialist"] for r in mine]),
                    "mean_length": interval([r["mean_length"][domain] for r in mine]),
                }
            for name in ("seconds", "seconds_lost", "interruptions", "batches_repeated"):
                entry[name] = interval([float(r[name]) for r in mine])
            entry["kills"] = {who: interval([float(r["kills"][who]) for r in mine]) for who in mine[0]["kills"]}
            out.append(entry)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--short", action="store_true", help="runs of about half the length")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/bench-mopd"), help="runs, finished or not")
    parser.add_argument("--seeds", type=int, default=0, help="how many; 5, or 1 with --quick")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--finished", action="store_true", help="run nothing: only what is finished in --work")
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 5)
    arms = [cast(Arm, a) for a in args.arms.split(",")]
    objectives = [cast(Objective, o) for o in args.objectives.split(",")]
    if unknown := sorted({*arms, *objectives} - {*ARMS, *OBJECTIVES}):
        parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join((*ARMS, *OBJECTIVES))})")
    school = School(addition_steps=20, sorting_steps=20, student_steps=5) if args.quick else School()
    work = args.work / ("quick" if args.quick else "short" if args.short else "full")
    console = Console(stderr=True)
    specialists = make_models(work / "models", school, console)
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for objective in objectives:
            for arm in arms:
                config = replace(StudentConfig(), arm=arm, objective=objective, seed=seed)
                config = replace(config, **(_QUICK if args.quick else _SHORT[objective] if args.short else {}))
                if args.finished and not (work / f"{objective}-{arm}-{seed}" / "done.json").is_file():
                    continue
                console.print(f"seed {seed}, {objective}, {arm}")
                runs.append(summarise(run_student(work, config, work / "models", console), specialists))
                # After each: an interruption leaves the results of what was run.
                save(args.json, {"arms": aggregate(runs), "specialists": specialists, "runs": runs}, quick=args.quick)
    rows = []
    for entry in aggregate(runs):
        cells = [f"{entry['objective']}, {entry['arm']}", len(entry["seeds"])]
        cells += [_percent(entry[d]["share_of_specialist"]) for d in DOMAINS]
        cells += [f"{entry[d]['mean_length']['mean']:.3f}" for d in DOMAINS]
        rows.append([*cells, f"{entry['seconds']['mean']:.0f}", f"{entry['seconds_lost']['mean']:.0f}"])
    names = [f"{d}, share" for d in DOMAINS] + [f"{d}, tokens" for d in DOMAINS]
    show("share of the specialist's accuracy, 95 % interval", ["arm", "seeds", *names, "s", "s lost"], rows)


def _percent(found: dict[str, Any]) -> str:
    text = f"{found['mean']:.1%}"
    return f"{text} ({found['low']:.1%} to {found['high']:.1%})" if "low" in found else text


if __name__ == "__main__":
    main()
