"""What the audit's commands share: options, errors, and how a report ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import click
from rich.console import Console
from rich.table import Table as RichTable

from ..errors import AuditError, RolloutWalError, problem
from .html import Cell, Page, Table
from .policies import Drop, Evict, KeepFirst, Policy, Restart, Resume, Truncate
from .schedules import SYNTAX

_P = ParamSpec("_P")
_R = TypeVar("_R")

POLICIES = (
    "restart | regenerate | drop | truncate | early | wal | wal-keyed | reused-seed | first:KEEP,OF | evict:SPAN,STEPS"
)


class Report(Protocol):
    """What every audit ends in."""

    @property
    def exit_status(self) -> int: ...

    def page(self) -> Page: ...

    def to_json(self) -> dict[str, Any]: ...


def told(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Errors of this package as one clear message and exit status 1."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except RolloutWalError as error:
            raise click.ClickException(str(error)) from error

    return run


def laws(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what is simulated or predicted."""
    options = [
        click.option(
            "--lengths",
            multiple=True,
            default=("uniform:1,200",),
            show_default=True,
            help="Law of one prompt's lengths; repeat for more prompts.",
        ),
        click.option("--interruptions", default="constant:0.005", show_default=True, help=SYNTAX),
        click.option(
            "--policy",
            "policies",
            multiple=True,
            default=("restart", "early", "wal"),
            show_default=True,
            help=POLICIES,
        ),
        click.option("--lag", default=20, show_default=True, help="Steps from sampling a token to its being durable."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every audit has."""
    options = [
        click.option(
            "--margin", default=0.02, show_default=True, help="Bias that counts as none, as a fraction of the mean."
        ),
        click.option(
            "--power",
            default=0.9,
            show_default=True,
            help="Chance of showing equivalence of the mean where there is no bias. Quantiles may take more rollouts.",
        ),
        click.option(
            "--out", type=click.Path(path_type=Path), help="Folder for report.html, summary.md and audit.json."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table."),
        click.option(
            "--fail-on-bias",
            is_flag=True,
            help="Exit with status 3 if bias is shown, 4 if neither bias nor its absence is shown.",
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of everything random in the audit."),
    ]
    for option in reversed(options):
        command = option(command)
    return told(command)


def parse_policy(text: str, lag: int) -> Policy:
    """A recovery policy from its command-line form.

    Raises:
        AuditError: not one of them.
    """
    kind, _, rest = text.partition(":")
    fixed: dict[str, Policy] = {
        "restart": Restart(),
        "regenerate": Restart("keyed"),
        "drop": Drop(),
        "truncate": Truncate(),
        "early": Resume(lag, "early"),
        "wal": Resume(lag, "commit"),
        "wal-keyed": Resume(lag, "commit", "keyed"),
        "reused-seed": Resume(0, "commit", "reused"),
    }
    if text in fixed:
        return fixed[text]
    numbers = rest.split(",")
    if kind in ("first", "evict") and len(numbers) == 2 and all(n.strip().isdecimal() for n in numbers):
        one, two = (int(n) for n in numbers)
        return KeepFirst(one, two) if kind == "first" else Evict(one, two)
    raise AuditError(
        problem(f"{text!r} names no recovery policy", consequence="No audit was made", remedy=f"Use {POLICIES}")
    )


def finish(report: Report, out: Path | None, as_json: bool, fail_on_bias: bool) -> None:
    result = report.to_json()
    page = report.page()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page.html(), encoding="utf-8")
        (out / "summary.md").write_text(page.markdown(), encoding="utf-8")
        (out / "audit.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(page)
        if out is not None:
            click.echo(f"Report: {out / 'report.html'}")
    if fail_on_bias:
        sys.exit(report.exit_status)


_STYLE = {"good": "green", "bad": "bold red", "warn": "yellow", "quiet": "dim", "": ""}


def _print(page: Page) -> None:
    """The first table of the page, which holds the verdict."""
    console = Console()
    if not console.is_terminal:  # a pipe or a CI log has no width of its own
        console.width = 120
    console.print(f"[bold]{page.title}[/bold]\n{page.subtitle}")
    tables = [part for section in page.sections for part in section.parts if isinstance(part, Table)]
    if not tables:
        for tile in page.tiles:
            console.print(f"{tile.label}: {tile.value}")
        return
    first = tables[0]
    table = RichTable(caption=first.caption or None)
    for column, right in zip(first.columns, first.numeric):
        table.add_column(column, justify="right" if right else "left")
    for row in first.rows:
        table.add_row(*(_styled(cell) for cell in row))
    console.print(table)


def _styled(cell: Cell) -> str:
    style = _STYLE[cell.tone]
    return f"[{style}]{cell.text}[/]" if style else cell.text
