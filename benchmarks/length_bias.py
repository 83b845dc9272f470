"""Does interruption bias the lengths of what is delivered? Every recovery policy, simulated, against the exact law.

    python -m benchmarks.length_bias [--quick] [--only simulated|engine] --json FILE

Each cell simulates a fleet whose workers are interrupted, and compares the delivered lengths with the exact true law
(its bias) and with the exact predicted law (its verdict). A cell is "expected" if the measured mean is shown to be
within the margin of the predicted one, and if the bias is shown to be there, or to be absent, as theory says.
Cells with a defect draw fresh noise after an interruption: keyed noise would hide it.

The number of rollouts is at least 100,000, and at least what equivalence at the margin takes, according to a pilot of
each cell, for the means of the whole table to come out as expected with 90 % power. `rollouts_needed` is what the mean
of the cell alone would take for 90 %, and `power` is of the mean alone too.

Then the same with the embedded engine and workers that are killed; see `_length_bias_engine`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollout_wal.audit.compare import Comparison, Settings
from rollout_wal.audit.lengths import LengthDistribution
from rollout_wal.audit.policies import Drop, Evict, KeepFirst, Policy, Restart, Resume, Truncate
from rollout_wal.audit.report import percent
from rollout_wal.audit.schedules import (
    Interruptions,
    bursts,
    constant,
    finishing_kills,
    never,
    once,
    out_of_memory,
    periodic,
    spot,
)
from rollout_wal.audit.simulate import simulate
from rollout_wal.audit.simulated import rollouts_for_power, simulated_comparison

from ._common import hardware
from ._length_bias_engine import engine_cells

ROLLOUTS_MIN = 100_000
MARGIN = 0.005
POWER = 0.9
LAG = 20

#: Three prompts of very different lengths: the tilt normalises within each.
MIXED = [
    LengthDistribution.uniform(1, 200),
    LengthDistribution.geometric(40, 300),
    LengthDistribution.lognormal(90, 0.5, 400),
]
UNIFORM = [LengthDistribution.uniform(1, 200)]

Cell = tuple[str, str, list[LengthDistribution], Interruptions, Policy]


def cells() -> list[Cell]:
    """(name of the policy, name of the lengths, lengths per prompt, interruptions, policy)."""
    out: list[Cell] = []

    def add(lengths: str, laws: list[LengthDistribution], process: Interruptions, *policies: Policy) -> None:
        out.extend((policy.name, lengths, laws, process, policy) for policy in policies)

    early, log, keyed = Resume(LAG, "early"), Resume(LAG, "commit"), Resume(LAG, "commit", "keyed")
    reused = Resume(0, "commit", "reused")
    restart, regenerate = Restart(), Restart("keyed")
    # The worked case: one failure, after 100 tokens.
    add("uniform 1..200", UNIFORM, once(100), restart, early, log, keyed, regenerate, reused, Drop(), Truncate())
    # Half or more of the rollouts interrupted.
    often = constant(0.008)
    first = KeepFirst(8, 12)
    add("uniform 1..200", UNIFORM, often, restart, early, log, keyed, regenerate)
    add("uniform 1..200", UNIFORM, often, Drop(), Truncate(), first, Evict(1, 80))
    # Whole workers at once: the same laws, less evidence.
    add("uniform 1..200", UNIFORM, constant(0.008, slots_per_worker=16), restart, early, log)
    add("uniform 1..200", UNIFORM, periodic(100), restart, early, log, reused)
    add("uniform 1..200", UNIFORM, bursts(300, 50, 0.05), restart, early, log)
    add("uniform 1..200", UNIFORM, spot(0.012, 30), restart, log)
    # Loss that depends on length or content breaks H2: a log with output commit is biased too, as predicted.
    add("uniform 1..200", UNIFORM, out_of_memory(100, 0.02), restart, log)
    add("uniform 1..200", UNIFORM, finishing_kills(0.1), log)
    add("three prompts", MIXED, often, restart, early, log)
    return out


def verdict(measured: Comparison) -> str:
    """ "expected" where theory and measurement agree: on the mean, and on whether there is a bias at all."""
    predicted = measured.predicted_delta_relative
    if predicted is None or not measured.predicted_agrees:
        return "unexpected"
    if predicted == 0 or abs(predicted) < 1e-9:
        return "expected" if measured.verdict == "equivalent" else "unexpected"
    return "expected" if measured.verdict == "biased" else "unexpected"


def identical(
    laws: list[LengthDistribution], process: Interruptions, policy: Policy, rollouts: int, seed: int
) -> bool | None:
    """With keyed noise: whether every rollout is the one of an uninterrupted run. None where noise is drawn afresh."""
    if getattr(policy, "noise", "fresh") != "keyed":
        return None
    hit = simulate(laws, process, policy, rollouts=rollouts, seed=seed).table
    calm = simulate(laws, never(), policy, rollouts=rollouts, seed=seed).table
    return bool((hit.length_N == calm.length_N).all())


def simulated_cells(quick: bool, seed: int) -> Iterable[dict[str, Any]]:
    margin = 0.02 if quick else MARGIN
    settings = Settings(margin=margin, quantile_margin=2 * margin, power=POWER, seed=seed)
    table = cells()
    together = replace(settings, power=1 - (1 - POWER) / len(table))
    for number, (name, lengths, laws, process, policy) in enumerate(table):
        begun = time.perf_counter()
        planned = rollouts_for_power(laws, process, policy, settings=together, seed=seed + 1000 + number)
        rollouts = planned if quick else max(ROLLOUTS_MIN, planned)
        measured = simulated_comparison(
            laws, process, policy, rollouts=rollouts, settings=settings, name=name, seed=seed + number
        )
        low, high = measured.interval_relative
        yield {
            "policy": name,
            "engine": "simulated",
            "lengths": lengths,
            "interruptions": process.label,
            "noise": getattr(policy, "noise", "fresh"),
            "rollouts": measured.rollouts,
            "rollouts_needed": measured.rollouts_needed,
            "interrupted_share": measured.interrupted_share,
            "true_mean": measured.reference_mean,
            "mean": measured.mean,
            "mean_delta_relative": measured.delta_relative,
            "ci_low": low,
            "ci_high": high,
            "margin": margin,
            "predicted_delta_relative": measured.predicted_delta_relative,
            "equivalence": measured.verdict,
            "p_difference": max(t.p_corrected for t in measured.tests),
            "design_effect": measured.design_effect,
            "power": measured.power,
            "recomputed_tokens": measured.recomputed_tokens,
            "hypotheses": {h.name: h.verdict for h in measured.hypotheses},
            "identical_to_uninterrupted": identical(laws, process, policy, rollouts, seed + number),
            "verdict": verdict(measured),
            "seconds": time.perf_counter() - begun,
        }


#: Where cells come from: functions (quick, seed) -> cells.
SOURCES: dict[str, Callable[[bool, int], Iterable[dict[str, Any]]]] = {
    "simulated": simulated_cells,
    "engine": engine_cells,
}
#: What the cells of a source say in `engine`.
ENGINES = {"simulated": "simulated", "engine": "embedded"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="wider margins, and fewer rollouts")
    parser.add_argument("--only", choices=list(SOURCES), help="run these, and keep the other cells that FILE holds")
    parser.add_argument("--json", type=Path, help="write the result here, after every cell")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.perf_counter()
    names = [options.only] if options.only else list(SOURCES)
    rows: list[dict[str, Any]] = []
    if options.only and options.json and options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))["cells"]
        rows = [row for row in known if row["engine"] != ENGINES[options.only]]
    for name in names:
        for cell in SOURCES[name](options.quick, options.seed):
            rows.append(cell)
            if options.json:
                save(options.json, rows, options, time.perf_counter() - begun)
    show(rows)


def save(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> None:
    """What there is so far."""
    result = {
        "benchmark": "length_bias",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "quick": options.quick,
        "seed": options.seed,
        "seconds": seconds,
        "expected": sum(row["verdict"] == "expected" for row in rows),
        "cells": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Bias of the mean length, with its 90 % interval")
    for column in ("interruptions", "lengths", "policy"):
        table.add_column(column)
    for column in ("rollouts", "hit", "bias", "interval", "predicted", "verdict"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["interruptions"],
            row["lengths"],
            row["policy"],
            f"{row['rollouts']:,}",
            f"{row['interrupted_share']:.0%}",
            percent(row["mean_delta_relative"]),
            f"{percent(row['ci_low'])} to {percent(row['ci_high'])}",
            percent(row["predicted_delta_relative"]),
            row["verdict"],
        )
    console = Console()
    if not console.is_terminal:
        console.width = 170
    console.print(table)


if __name__ == "__main__":
    main()
