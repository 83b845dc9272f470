"""`rollout-wal trace`: what became of a rollout, or what an optimizer step was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from ..errors import BadInput, problem
from ..job_state import Rollout
from ..job_view import JobView
from ._output import JSON, print_facts, print_json, print_table
from .inspect import summary

_SCORES = ("source", "checkpoint", "precision")


@click.command()
@click.argument("what")
@click.option(
    "--wal",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The job's logs: rollouts in flight, and those that no checkpoint contains yet.",
)
@click.option(
    "--archive",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The dataset of consumed rollouts that a trainer keeps (archive=...), or any other dataset of this project.",
)
@JSON
def trace(what: str, wal: Path | None, archive: Path | None, as_json: bool) -> None:
    """Say what became of a rollout, or what an optimizer step was trained on.

    WHAT is a rollout's id (17), its key (grpo.0/3/5) or an optimizer step (step:12). For each rollout: the policy
    versions that sampled it and how many tokens each, the interruptions that it survived, teachers, router, verifier,
    how many tokens the loss saw, reward, and the optimizer step that consumed it.

    \b
    rollout-wal trace step:12 --wal runs/wal --archive runs/archive
    rollout-wal trace grpo.0/3/5 --archive runs/archive --json
    """
    if wal is None and archive is None:
        raise click.UsageError("pass --wal, --archive, or both: there is nowhere to look")
    rows = [row for row in (*_archived(archive), *_logged(wal)) if _is(row, what)]
    if not rows:
        raise BadInput(
            problem(
                f"nothing is known of {what!r} in {' and '.join(str(p) for p in (wal, archive) if p)}",
                consequence="Nothing is shown; a released rollout is known to the archive only",
                remedy="Pass an id, a key such as grpo.0/3/5, or step:N, and the folders of that run",
            )
        )
    if as_json:
        print_json(rows)
    elif len(rows) == 1:
        print_facts(what, {name: _cell(value) for name, value in rows[0].items()})
    else:
        columns = ["key", "versions", "interruptions", "tokens", "loss_tokens", "end", "reward", "step"]
        # A column that would be empty, or the same in every row, is no column.
        columns += [c for c in ("teachers", "router", "verifier") if any(_cell(row[c]) != "-" for row in rows)]
        places = {row["where"] for row in rows}
        columns += ["where"] if len(places) > 1 else []
        title = f"{what}: {len(rows)} rollouts in {' and '.join(sorted(places))}"
        print_table(title, columns, [[_cell(row[c]) for c in columns] for row in rows])


def _is(row: dict[str, Any], what: str) -> bool:
    if what.startswith("step:"):
        return str(row["step"]) == what.removeprefix("step:")
    return what in (str(row["rollout"]), row["key"])


def _archived(folder: Path | None) -> Iterator[dict[str, Any]]:
    if folder is None:
        return
    from ..dataset import open_dataset

    dataset = open_dataset(folder)
    scores: dict[str, dict[str, Any]] = {}
    for group in (g for g in dataset.groups if g != "tokens"):
        for row in dataset.provenance(group).to_pylist():
            scores.setdefault(row["sample"], {})[group] = {k: row[k] for k in _SCORES if row.get(k)}
    for row in dataset.metadata().to_pylist():
        extras = json.loads(row["extras"] or "{}")
        yield {
            "key": row["sample"],
            "rollout": row["rollout"],
            "group": row["group"],
            "versions": list(zip(row["policy_versions"], row["policy_version_tokens"], strict=True)),
            "interruptions": row["interruptions"],
            "prompt_tokens": row["prompt_length"],
            "tokens": row["response_length"],
            "loss_tokens": row["loss_tokens"],
            "end": row["finish_reason"] or f"censored ({row['censored']})",
            "reward": row["reward"],
            "teachers": row["teachers"],
            "scores": scores.get(row["sample"], {}),
            "router": [row[f"router_{part}"] for part in ("id", "version", "reason")],
            "verifier": row["verifier_version"],
            "sampling": json.loads(row["sampling"] or "{}"),
            "step": extras.get("optimizer_step"),
            "extras": extras,
            "where": str(folder),
        }


def _logged(path: Path | None) -> Iterable[dict[str, Any]]:
    if path is None:
        return
    view = JobView(path)
    view.refresh()
    for rollout in view.job.rollouts.values():
        yield _live(view, rollout, path)


def _live(view: JobView, rollout: Rollout, path: Path) -> dict[str, Any]:
    known, tokens = summary(view, rollout), view.tokens(rollout)
    return {
        "key": f"{view.job.cohorts[rollout.begin.cohort].record.name}/{rollout.begin.index}",
        "rollout": rollout.id,
        "group": rollout.begin.group,
        "versions": [(int(v), len(list(run))) for v, run in groupby(tokens.turn_version_T.tolist())],
        "interruptions": rollout.interruptions,
        "prompt_tokens": known["prompt_tokens"],
        "tokens": known["tokens"],
        "loss_tokens": int(tokens.sampled_T.sum()),
        "end": known["status"],
        "reward": None,
        "teachers": [],
        "scores": {},
        "router": [None, None, None],
        "verifier": None,
        "sampling": rollout.begin.sampling,
        "step": rollout.consumed[1] if rollout.consumed else None,
        "extras": dict(rollout.begin.metadata or {}),
        "where": str(path),
    }


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # policy versions
        return ", ".join(f"v{version} x {tokens}" for version, tokens in value)
    if isinstance(value, list):
        return ", ".join(str(v) for v in value if v is not None) or "-"
    if isinstance(value, dict):
        return json.dumps(value) if value else "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
