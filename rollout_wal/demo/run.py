"""The main job from end to end: prompts, five variants, table, report, summary."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..audit.demo import bias_of, demo_page
from ..audit.lengths import LengthDistribution
from ..audit.policies import Restart, Resume
from ..audit.schedules import constant
from ..audit.theory import predict
from .snapshots import print_snapshots, snapshot_section, summarise_snapshots
from .tasks import prepare
from .variants import Plan, Result, Variants

TITLES = {
    "uninterrupted": "uninterrupted",
    "restart": "restart from scratch, fresh noise",
    "early_delivery": "resume, delivered before durable, fresh noise",
    "wal": "the log, output commit, fresh noise",
    "wal_keyed": "the log, output commit, keyed noise",
    "wal_kv": "the log, output commit, keyed noise, KV snapshots",
    "regenerate": "regenerate from the same seed",
}
#: Runs that are compared token for token; their lengths say nothing that the others do not.
_PROOFS = ("wal_keyed", "wal_kv")


def run_demo(out: Path, plan: Plan, console: Console) -> dict[str, Any]:
    """Run what is still to be run, write report.html and summary.json into `out`, and return the summary."""
    work = out / "work"
    config = out / "plan.json"
    wanted = json.dumps(asdict(plan), sort_keys=True)
    if config.is_file() and config.read_text() != wanted:
        shutil.rmtree(work, ignore_errors=True)  # another plan's rollouts; its log would rightly refuse these
    work.mkdir(parents=True, exist_ok=True)
    config.write_text(wanted)
    console.print(
        f"[bold]{plan.rollouts} rollouts[/] ({plan.prompts} prompts x {plan.group_size}) in {plan.workers} worker "
        f"processes; each is killed with probability {plan.hazard:.4f} per token"
    )
    model, prompts = prepare(work, plan.prompts, mean_length=plan.mean_length, seed=plan.seed)
    variants = Variants(plan, model, prompts, work)

    def baseline(mode: Any) -> Callable[[str], Result]:
        def run(name: str) -> Result:
            with _bar(console) as bar:
                task = bar.add_task(name, total=plan.rollouts)
                return variants.baseline(name, mode=mode, tick=lambda n: bar.update(task, completed=n))

        return run

    steps: list[tuple[str, Callable[[str], Result]]] = [
        ("uninterrupted", lambda name: variants.with_log(name, noise="position", kills=False)),
        ("restart", baseline("restart")),
        ("early_delivery", baseline("early")),
        ("wal", lambda name: variants.with_log(name, noise="attempt", kills=True)),
        ("wal_keyed", lambda name: variants.with_log(name, noise="position", kills=True)),
        ("wal_kv", lambda name: variants.with_log(name, noise="position", kills=True, kv=True)),
        ("regenerate", baseline("regenerate")),
    ]
    results: dict[str, Result] = {}
    for number, (name, run) in enumerate(steps, 1):
        console.print(f"\n[bold]{number}/{len(steps)}[/] {TITLES[name]}")
        results[name] = variants.once(name, run)
    summary = summarise(results, plan)
    summary["kv_snapshots"] = summarise_snapshots(
        results["wal_keyed"],
        results["wal_kv"],
        identical(results["wal_kv"], results["uninterrupted"]),
        variants.resume_times(_typical_lengths(results["uninterrupted"], prompts.tokens, plan)),
    )
    _print(console, summary, results)
    print_snapshots(console, summary["kv_snapshots"])
    page = demo_page(
        summary,
        {name: r.length_N for name, r in results.items() if name not in _PROOFS},
        prompts={name: np.repeat(np.arange(plan.prompts), plan.group_size) for name in results},
        predicted=_laws(results, plan),
        title="Rollouts that survive",
        subtitle=f"{plan.rollouts} rollouts per variant in {plan.workers} worker processes that are really killed, "
        f"hazard {plan.hazard:.4f} per token",
        notes=_notes(summary, plan),
    )
    page.sections.insert(-1, snapshot_section(summary["kv_snapshots"], plan.kv_every))  # before how it was made
    _replace(out / "report.html", page.html())
    _replace(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(f"\nreport   {out / 'report.html'}\nsummary  {out / 'summary.json'}")
    return summary


def summarise(results: dict[str, Result], plan: Plan) -> dict[str, Any]:
    """summary.json."""
    reference = results["uninterrupted"]
    true = LengthDistribution.from_lengths(reference.length_N)
    prompt_N = np.repeat(np.arange(plan.prompts), plan.group_size)
    predicted = {name: law.mean for name, law in _laws(results, plan).items()}
    variants: dict[str, Any] = {}
    for name, r in results.items():
        if name in _PROOFS:
            continue
        estimate = bias_of(r.length_N, reference.length_N, prompt_N=prompt_N, reference_prompt_N=prompt_N)
        low, high = (0.0, 0.0) if name == "uninterrupted" else (estimate.ci_low, estimate.ci_high)
        variants[name] = {
            "mean_length": float(r.length_N.mean()),
            "rollouts": len(r.length_N),
            "interruptions": r.interruptions,
            "interrupted_rollouts": r.interrupted_rollouts,
            "worker_deaths": r.deaths,
            "lost_acknowledged_tokens": r.lost_acknowledged_tokens,
            "tokens_recomputed": r.tokens_recomputed,
            "seconds": r.seconds,
            "seconds_lost": r.seconds - reference.seconds,
            "bias_tokens": float(r.length_N.mean() - reference.length_N.mean()),
            "bias_interval": [low, high],
        }
        if name in predicted:
            variants[name]["predicted_mean_length"] = predicted[name]
    keyed = results["wal_keyed"]
    variants["wal"] |= {
        "identical_to_uninterrupted": identical(keyed, reference),
        "balance": results["wal"].balance,
        "keyed": {
            "mean_length": float(keyed.length_N.mean()),
            "interruptions": keyed.interruptions,
            "worker_deaths": keyed.deaths,
            "lost_acknowledged_tokens": keyed.lost_acknowledged_tokens,
            "tokens_recomputed": keyed.tokens_recomputed,
            "seconds": keyed.seconds,
        },
    }
    variants["regenerate"]["identical_to_uninterrupted"] = identical(results["regenerate"], reference)
    return {"plan": asdict(plan), "true_mean_length": true.mean, "variants": variants}


def identical(one: Result, other: Result) -> bool:
    """The same rollouts, token for token."""
    return np.array_equal(one.length_N, other.length_N) and np.array_equal(one.token_F, other.token_F)


def _typical_lengths(result: Result, prompts: Sequence[NDArray[np.int32]], plan: Plan) -> list[int]:
    """Tokens of prompt and output: of the median rollout, and of the longest."""
    prompt_N = np.repeat([len(p) for p in prompts], plan.group_size)
    return [int(np.quantile(prompt_N + result.length_N, q)) for q in (0.5, 1.0)]


def _laws(results: dict[str, Result], plan: Plan) -> dict[str, LengthDistribution]:
    """The exact laws of the two biased variants, given the uninterrupted lengths and the hazard."""
    true = LengthDistribution.from_lengths(results["uninterrupted"].length_N)
    process = constant(plan.hazard)
    return {
        "restart": predict(true, process, Restart()).accepted,
        "early_delivery": predict(true, process, Resume(plan.lag, "early")).accepted,
    }


def _notes(summary: dict[str, Any], plan: Plan) -> list[str]:
    wal = summary["variants"]["wal"]
    same = "equals" if wal["identical_to_uninterrupted"] else "DIFFERS FROM"
    return [
        f"With keyed noise the log's output {same} the uninterrupted run token for token, over "
        f"{wal['keyed']['interruptions']} interruptions. The statistics of the log are shown with noise drawn afresh "
        "at each resume, because keyed noise would hide a defect: lost tokens would come back the same.",
        "The predictions are exact laws for the lengths of the uninterrupted run and the hazard; prompts are pooled, "
        "which this model allows: its lengths hardly depend on the prompt.",
        f"Early delivery logs each step {plan.lag} steps late and shows finished rollouts at once.",
        f"Cohort balance of the log: {wal['balance']}.",
    ]


def _print(console: Console, summary: dict[str, Any], results: dict[str, Result]) -> None:
    table = Table(title="five ways of coping with the same kills", title_justify="left", padding=(0, 0))
    for column in (
        "variant",
        "mean",
        "bias (90 %)",
        "predicted",
        "inter-\nrupted",
        "tokens\nlost",
        "tokens\nagain",
        "time\nlost",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, v in summary["variants"].items():
        low, high = v["bias_interval"]
        biased = name != "uninterrupted" and (low > 0 or high < 0)
        bias = "" if name == "uninterrupted" else f"{v['bias_tokens']:+.1f}\n{low:+.1f} .. {high:+.1f}"
        table.add_row(
            TITLES[name].replace(", ", ",\n", 1),
            f"{v['mean_length']:.1f}",
            f"[red]{bias}[/]" if biased else f"[green]{bias}[/]",
            f"{v['predicted_mean_length']:.1f}" if "predicted_mean_length" in v else "",
            f"{v['interruptions']}",
            f"{v['lost_acknowledged_tokens']}",
            f"{v['tokens_recomputed']}",
            f"{v['seconds_lost']:+.0f} s",
            end_section=True,
        )
    console.print()
    console.print(table)
    wal = summary["variants"]["wal"]
    same = "[green]identical[/]" if wal["identical_to_uninterrupted"] else "[bold red]NOT IDENTICAL[/]"
    keyed = results["wal_keyed"]
    console.print(
        f"the log with keyed noise: {same} to the uninterrupted run, token for token, over {keyed.deaths} deaths\n"
        f"balance: {wal['balance']}"
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("rollouts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
