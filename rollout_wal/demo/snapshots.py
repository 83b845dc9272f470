"""What KV snapshots save: the same rollouts under the same kills, resumed without them and with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ..audit.html import Cell, Section
from .resuming import ResumeTime
from .variants import Result


def summarise_snapshots(without: Result, having: Result, same: bool, times: Sequence[ResumeTime]) -> dict[str, Any]:
    """`kv_snapshots` of summary.json. `same`: the run with snapshots gave the tokens of the uninterrupted one."""
    return {
        "without": _of(without),
        "with": _of(having) | {"identical_to_uninterrupted": same},
        "time_to_resume": [asdict(t) for t in times],
    }


def _of(result: Result) -> dict[str, Any]:
    resumed = max(1, result.resumed)
    return {
        "worker_deaths": result.deaths,
        "rollouts_resumed": result.resumed,
        "tokens_recomputed": result.tokens_recomputed,
        "tokens_loaded": result.tokens_loaded,
        "tokens_recomputed_per_resume": result.tokens_recomputed / resumed,
        "seconds_until_resubmitted": result.seconds_resuming / resumed,
        "seconds_loading_per_resume": result.seconds_loading / resumed,
        "snapshots": result.snapshots,
        "fallbacks": result.kv_fallbacks,
        "balance": result.balance,
    }


def snapshot_rows(kv: dict[str, Any]) -> list[tuple[str, ...]]:
    """(what, without snapshots, with them), for the terminal and for the report."""
    a, b = kv["without"], kv["with"]
    rows: list[tuple[str, ...]] = [
        ("worker deaths", f"{a['worker_deaths']:,}", f"{b['worker_deaths']:,}"),
        ("rollouts resumed", f"{a['rollouts_resumed']:,}", f"{b['rollouts_resumed']:,}"),
        ("output tokens recomputed", f"{a['tokens_recomputed']:,}", f"{b['tokens_recomputed']:,}"),
        ("per resumed rollout", *(f"{v['tokens_recomputed_per_resume']:,.1f}" for v in (a, b))),
        ("output tokens loaded", f"{a['tokens_loaded']:,}", f"{b['tokens_loaded']:,}"),
        ("from death to resubmission", *(f"{1e3 * v['seconds_until_resubmitted']:,.0f} ms" for v in (a, b))),
    ]
    rows += [
        (
            f"then to the next token, {t['tokens']} tokens in",
            f"{1e3 * t['prefill_s']:,.1f} ms",
            f"{1e3 * t['load_s']:,.1f} ms",
        )
        for t in kv["time_to_resume"]
    ]
    return rows


def snapshot_section(kv: dict[str, Any], every_tokens: int) -> Section:
    """For the report."""
    same = "equal" if kv["with"]["identical_to_uninterrupted"] else "DIFFER FROM"
    section = Section("What KV snapshots save")
    section.prose(
        "The log with keyed noise, twice under the same kills: resumed by computing everything again, and from "
        f"snapshots of the KV cache, taken when a worker is asked to stop and in the background every {every_tokens} "
        f"tokens. The tokens of the run with snapshots {same} those of the uninterrupted run."
    )
    section.table(
        ["", "without snapshots", "with snapshots"],
        [[Cell(what), Cell(a), Cell(b, tone=_tone(what, kv))] for what, a, b in snapshot_rows(kv)],
        "Times to the next token: medians of one rollout alone on one core, disk cache cold. A model this small "
        "computes a short context about as fast as it can be read; the larger the model, the sooner loading wins.",
    )
    return section


def print_snapshots(console: Console, kv: dict[str, Any]) -> None:
    """For the terminal."""
    table = Table(title="what KV snapshots save", title_justify="left", padding=(0, 1))
    table.add_column("the log, keyed noise")
    table.add_column("without", justify="right")
    table.add_column("with", justify="right")
    for row in snapshot_rows(kv):
        table.add_row(*row)
    console.print()
    console.print(table)
    same = kv["with"]["identical_to_uninterrupted"]
    verdict = "[green]identical[/]" if same else "[bold red]NOT IDENTICAL[/]"
    console.print(f"the log with snapshots: {verdict} to the uninterrupted run, token for token")
    if kv["with"]["fallbacks"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(kv["with"]["fallbacks"].items()))
        console.print(f"[dim]resumes that computed everything again, by reason: {reasons}[/]")


def _tone(what: str, kv: dict[str, Any]) -> Any:
    if what != "output tokens recomputed":
        return ""
    return "good" if kv["with"]["tokens_recomputed"] < kv["without"]["tokens_recomputed"] else "bad"
