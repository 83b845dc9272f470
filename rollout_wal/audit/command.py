"""`rollout-wal audit`: measure whether interruptions distort the lengths of training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table as RichTable

from ..errors import AuditError, problem
from .command_log import log
from .command_options import finish, laws, parse_policy, shared, told
from .command_run import run
from .lengths import LengthDistribution, parse_lengths
from .schedules import parse_interruptions


@click.group()
def audit() -> None:
    """Measure whether interruptions distort the lengths of training data.

    A rollout that is interrupted and sampled again is more likely to be a long one, so what is delivered is biased
    short. `run` measures a backend with and without interruptions; `data` looks at rollouts that were recorded
    elsewhere; `predict` computes what theory expects.
    """


audit.add_command(run)
run.add_command(log)


@audit.command("data")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), help="The same prompts and weights, run without interruptions."
)
@shared
def data(
    file: Path,
    reference: Path | None,
    margin: float,
    power: float,
    out: Path | None,
    as_json: bool,
    fail_on_bias: bool,
    seed: int,
) -> None:
    """Rollouts that were recorded elsewhere: Parquet, JSONL or CSV.

    Columns: prompt, length, interrupted (a count, or true/false); optional: worker, failure, start, end, reason,
    recomputed, arm, and any other numbers or texts to compare. Rows of the arm "reference", or those of
    --reference, are from an uninterrupted run. Without them the data can be found biased, never unbiased.
    """
    from .compare import Settings, compare
    from .estimate import hazard_per_token, restart_prediction
    from .hypotheses import closed_cohort, independent_loss, output_commit, single_noise
    from .recorded import REFERENCE_ARM, Codes, read_recorded
    from .report import Audit
    from .signature import signature
    from .unreferenced import Unreferenced

    codes = Codes()
    recorded = read_recorded(file, codes)
    arms = dict(recorded.arms)
    calm = arms.pop(REFERENCE_ARM, None)
    if reference is not None:
        other = read_recorded(reference, codes).arms
        calm = other.get(REFERENCE_ARM) or next(iter(other.values()))
    if not arms:
        raise AuditError(
            problem(
                f"{file} holds only rows of the arm {REFERENCE_ARM!r}",
                consequence="There is nothing to audit",
                remedy="Give the interrupted rollouts another arm, or none",
            )
        )
    settings = Settings(margin=margin, quantile_margin=2 * margin, power=power, seed=seed)

    def closed(name: str) -> Any:
        return closed_cohort(arms[name], begun=len(arms[name]) if recorded.begun_known else None)

    if calm is None:
        if len(arms) > 1:
            raise AuditError(
                problem(
                    f"{file} holds the arms {', '.join(arms)} and no reference",
                    consequence="Without one they can only be looked at one by one",
                    remedy="Pass --reference, or a file with one arm",
                )
            )
        name, table = next(iter(arms.items()))
        finish(Unreferenced(name, table, signature(table), closed(name), settings), out, as_json, fail_on_bias)
        return
    comparisons, notes = [], []
    for name, table in arms.items():
        prediction = restart_prediction(calm, hazard_per_token(table)) if table.interruptions_N.any() else None
        comparisons.append(
            compare(
                name,
                table,
                calm,
                settings=settings,
                prediction=prediction,
                hypotheses=(output_commit(None), closed(name), independent_loss(None), single_noise(None)),
            )
        )
        found = signature(table)
        if found is not None:
            notes.append(f"{name}: {found.explanation}")
    notes.append(
        "The prediction is that of restarting from scratch at the recorded rate of interruptions: where the data agree "
        "with it, that is what happened."
    )
    audited = Audit(
        "Length-bias audit of recorded data",
        file.name,
        tuple(comparisons),
        settings,
        tuple(notes),
        predicted="if restarted",
    )
    finish(audited, out, as_json, fail_on_bias)


@audit.command("predict")
@laws
@click.option(
    "--retry",
    type=click.Choice(["same_prompt", "any_prompt"]),
    default="same_prompt",
    show_default=True,
    help="What replaces a lost rollout.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@told
def predict_command(
    lengths: tuple[str, ...], interruptions: str, policies: tuple[str, ...], lag: int, retry: Any, as_json: bool
) -> None:
    """What theory expects, exactly: no sampling, no data.

    \b
    rollout-wal audit predict --lengths uniform:1,200 --interruptions once:100 --policy restart
    """
    from .report import percent
    from .theory import predict_mixture

    law_of: Sequence[LengthDistribution] = [parse_lengths(text) for text in lengths]
    process = parse_interruptions(interruptions)
    rows: list[dict[str, Any]] = []
    for text in policies:
        p = predict_mixture(law_of, process, parse_policy(text, lag), retry=retry)
        rows.append(
            {
                "policy": text,
                "true_mean": p.true.mean,
                "mean": p.accepted.mean,
                "delta_relative": p.delta_relative,
                "delivered": p.delivered,
                "censored_length_mass": p.censored_length_mass,
                "interruptions": p.interruptions,
                "recomputed": p.recomputed,
            }
        )
    if as_json:
        click.echo(json.dumps({"interruptions": process.label, "cells": rows}, indent=2))
        return
    table = RichTable(title=process.label)
    for column in ("policy", "true mean", "delivered mean", "bias", "delivered", "interruptions", "tokens recomputed"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        known = ["–" if row[k] is None else f"{row[k]:.3f}" for k in ("interruptions", "recomputed")]
        bias = percent(row["delta_relative"])
        table.add_row(
            str(row["policy"]), f"{row['true_mean']:.3f}", f"{row['mean']:.3f}", bias, f"{row['delivered']:.1%}", *known
        )
    Console().print(table)
