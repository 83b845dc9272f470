"""`rollout-wal demo-mopd`."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import click

from .config import ARMS, OBJECTIVES, Objective, School, StudentConfig


@click.command("demo-mopd")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/mopd"), show_default=True, help="Folder of the report."
)
@click.option("--arm", type=click.Choice(ARMS), help="killed (default), unkilled, or restart: what was hurt is redone.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="One of them instead of both.")
@click.option("--seed", type=int, help="Of problems, noise and kills.")
@click.option("--batches", type=int, help="Generation batches, one policy version each.")
@click.option("--rollouts", type=int, help="Rollouts of a batch.")
@click.option("--workers", type=int, help="Rollout workers.")
@click.option("--hazard", type=float, help="Probability that a worker is killed at an engine step.")
@click.option("--trainer-kills", type=int, help="How often the trainer is killed.")
@click.option("--server-kills", type=int, help="How often the scoring server is killed.")
@click.option("--lessons", type=float, default=1.0, help="Scales the supervised steps that make the models.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of the table.")
def demo_mopd(out: Path, objective: Objective | None, lessons: float, as_json: bool, **overrides: Any) -> None:
    """Multi-teacher on-policy distillation while everything is killed.

    Makes two specialists (addition and sorting), serves them in MXFP4 over gRPC, and distills both into one student on
    its own rollouts: once from log-probabilities of sampled tokens, once from hidden states over the whole vocabulary.
    Rollout workers, the scoring server and the trainer are killed at random. Writes OUT/report.html and
    OUT/summary.json. The exit status is 1 if the student stays below 95 % of a specialist's accuracy.

    Kill it at any moment and start it again: it goes on.
    """
    from rich.console import Console

    from .run import Plan, run_demo

    known = {f.name for f in fields(StudentConfig)}
    student = replace(StudentConfig(), **{k: v for k, v in overrides.items() if k in known and v is not None})
    school = School()
    steps = {
        f.name: max(1, round(getattr(school, f.name) * lessons)) for f in fields(School) if f.name.endswith("_steps")
    }
    plan = Plan(replace(school, **steps), student, (objective,) if objective else get_args(Objective))
    summary = run_demo(out, plan, Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(summary))
    if not all(run["reached"] for run in summary["runs"].values()):
        raise SystemExit(1)
