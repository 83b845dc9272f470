"""`rollout-wal demo`."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True, help="Folder of the report."
)
@click.option("--prompts", type=int, help="Prompts from procedural tasks.")
@click.option("--group-size", type=int, help="Completions of each prompt.")
@click.option("--workers", type=int, help="Worker processes.")
@click.option("--hazard", type=float, help="Probability that a worker is killed at an engine step.")
@click.option("--mean-length", type=float, help="Mean tokens of a completion of the tiny model.")
@click.option(
    "--max-tokens", type=int, help="At most so many; exp(hazard x max-tokens) attempts regenerate the longest."
)
@click.option("--seed", type=int, help="Of the prompts, the model, the noise and the kills.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of the table.")
def demo(out: Path, as_json: bool, **overrides: Any) -> None:
    """Five ways of coping with dying workers, side by side.

    Runs the same rollouts of a tiny model uninterrupted, restarted from scratch, resumed with delivery before
    durability, with the log, and regenerated from the same seed, while worker processes are really killed. Writes
    OUT/report.html and OUT/summary.json.

    Kill it at any moment and start it again: it goes on with the same rollouts.
    """
    from rich.console import Console

    from ..third_party import quiet_imports
    from .run import run_demo
    from .variants import Plan

    quiet_imports()
    known = {f.name for f in fields(Plan)}
    plan = replace(Plan(), **{k: v for k, v in overrides.items() if k in known and v is not None})
    summary = run_demo(out, plan, Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(summary))
