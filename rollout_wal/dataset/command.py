"""`rollout-wal dataset`: look at a dataset, check it, and keep it in order."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .errors import DatasetError

_FOLDER = click.Path(exists=True, file_okay=False)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def _clear_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A dataset error is one message and exit status 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DatasetError as error:
            raise click.ClickException(str(error)) from error

    return run


def _writer_id() -> str:
    return f"cli-{os.getpid()}"


@click.group()
def dataset() -> None:
    """Work with a folder of sealed rollouts.

    A dataset holds light metadata (one row per rollout) and heavy payload (one value per token) in separate Arrow
    files, listed in versioned manifests. Any Arrow reader opens the files; these commands know the manifest.
    """


@dataset.command()
@click.argument("folder", type=_FOLDER)
@click.option("--version", type=int, help="Look at an earlier version of the dataset.")
@_json_option
@_clear_errors
def stats(folder: str, version: int | None, as_json: bool) -> None:
    """Count what a dataset holds. Reads its metadata only."""
    from .reader import open_dataset
    from .verify import statistics

    found = statistics(open_dataset(folder, version=version))
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("what", "value", title=f"{folder} at version {found['version']}")
    for name, value in found.items():
        shown = ", ".join(f"{k or '(none)'}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), str(shown))
    Console().print(table)


@dataset.command()
@click.argument("folder", type=_FOLDER)
@click.option("--version", type=int, help="Check an earlier version of the dataset.")
@_json_option
@_clear_errors
def verify(folder: str, version: int | None, as_json: bool) -> None:
    """Read every byte of a dataset and check all of it.

    Checksums of files, schemas, that each location holds the rollout it should, checksums of tokens, loss masks
    against segment kinds, and that no score is NaN or infinite. Exit status 1 if anything is wrong.
    """
    from .reader import open_dataset
    from .verify import verify as check

    opened = open_dataset(folder, version=version, check_files=False)
    total = sum(entry.bytes for entry in opened.state.files())
    with Progress(console=Console(stderr=True), disable=as_json, transient=True) as progress:
        task = progress.add_task("bytes", total=total)
        faults = check(opened, progress=lambda size: progress.advance(task, size))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "version": opened.version,
                    "files": len(opened.state.files()),
                    "bytes": total,
                    "faults": [{"file": f.file, "what": f.what} for f in faults],
                }
            )
        )
    else:
        for fault in faults:
            click.echo(f"{fault.file}: {fault.what}")
        verdict = f"{len(faults)} things are wrong" if faults else "all is sound"
        click.echo(f"{len(opened.state.files())} files, {total} bytes at version {opened.version}: {verdict}")
    if faults:
        sys.exit(1)


@dataset.command()
@click.argument("target", type=click.Path(file_okay=False))
@click.argument("sources", nargs=-1, required=True, type=_FOLDER)
@_json_option
@_clear_errors
def merge(target: str, sources: tuple[str, ...], as_json: bool) -> None:
    """Copy everything in SOURCES into the dataset TARGET, which is created if there is none.

    A rollout that is in several of them is kept once. Merging again adds only what is new. Datasets of different
    tokenizers are refused.
    """
    from .merge import merge as merge_into
    from .writer import DatasetWriter

    info = merge_into(DatasetWriter(target, writer_id=_writer_id()), sources)
    _report(as_json, {"version": info.version, "added": len(info.added), "present": len(info.present)})


@dataset.command()
@click.argument("folder", type=_FOLDER)
@click.argument("keys", nargs=-1, required=True)
@click.option("--reason", required=True, help="Why; kept with the tombstone.")
@_json_option
@_clear_errors
def tombstone(folder: str, keys: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Take the samples with these KEYS out of a dataset, for good: they are not sealed again either."""
    from .writer import DatasetWriter

    info = DatasetWriter(folder, writer_id=_writer_id()).tombstone(keys, reason)
    _report(as_json, {"version": info.version, "tombstoned": len(info.added), "gone_before": len(info.present)})


@dataset.command()
@click.argument("folder", type=_FOLDER)
@click.option("--start-version-min", type=int, help="Keep rollouts that started under at least this policy version.")
@click.option("--age-days-max", type=float, help="Keep rollouts that were sealed no longer ago than this.")
@click.option("--tokens-max", type=int, help="Keep the newest rollouts up to so many tokens in all.")
@_json_option
@_clear_errors
def retain(
    folder: str, start_version_min: int | None, age_days_max: float | None, tokens_max: int | None, as_json: bool
) -> None:
    """Let old rollouts go by a rule. Frees no disk space by itself: `vacuum` deletes what nothing needs."""
    from .retention import Retention
    from .retention import retain as apply
    from .writer import DatasetWriter

    age_s = None if age_days_max is None else age_days_max * 86_400
    info = apply(DatasetWriter(folder, writer_id=_writer_id()), Retention(start_version_min, age_s, tokens_max))
    _report(as_json, {"version": info.version, "gone": len(info.added)})


@dataset.command()
@click.argument("folder", type=_FOLDER)
@click.option("--grace-hours", type=float, default=24.0, show_default=True, help="Leave younger files alone.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@_json_option
@_clear_errors
def vacuum(folder: str, grace_hours: float, dry_run: bool, as_json: bool) -> None:
    """Delete files that the newest version does not need: leavings of writers that died, and retired payload."""
    from .reader import open_dataset
    from .retention import vacuum as sweep

    gone = sweep(open_dataset(folder), grace_s=grace_hours * 3600, dry_run=dry_run)
    _report(as_json, {"files": len(gone), "bytes": sum(gone.values()), "deleted": not dry_run})


@dataset.command()
@click.argument("folder", type=_FOLDER)
@click.argument("output", type=click.Path(dir_okay=False))
@click.option("--token-budget", type=int, required=True, help="Tokens of one packed row.")
@click.option("--ranks", type=int, default=1, show_default=True, help="Data-parallel ranks.")
@click.option("--bins-per-rank", type=int, default=1, show_default=True, help="Packed rows per rank and step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the global shuffle.")
@click.option("--epoch", type=int, default=0, show_default=True, help="Another epoch is another order.")
@click.option("--domain", "domains", multiple=True, help="Plan only these domains; may be given several times.")
@click.option("--too-long", type=click.Choice(["error", "skip", "own_batch"]), default="error", show_default=True)
@click.option("--whole-groups", is_flag=True, help="Never split a group of samples across optimizer steps.")
@click.option("--current-version", type=int, help="With --max-lag: the policy version that is about to be trained.")
@click.option("--max-lag", type=int, help="Leave out rollouts that started more versions ago than this.")
@_json_option
@_clear_errors
def plan(
    folder: str,
    output: str,
    domains: tuple[str, ...],
    current_version: int | None,
    max_lag: int | None,
    as_json: bool,
    **spec: Any,
) -> None:
    """Plan an epoch over a dataset and write it to OUTPUT, an Arrow file.

    Reads metadata only. Says what was left out, how full the packed rows are, and how even the ranks.
    """
    import pyarrow.compute as pc

    from .freshness import Freshness
    from .planner import PlanSpec
    from .planner import plan as make
    from .reader import open_dataset

    if (current_version is None) != (max_lag is None):
        raise click.UsageError("--current-version and --max-lag go together.")
    if domains:
        spec |= {"filter": pc.field("domain").isin(list(domains)), "filter_columns": ("domain",)}
    if current_version is not None and max_lag is not None:
        spec["freshness"] = Freshness(current_version, max_lag)
    made = make(open_dataset(folder), PlanSpec(**spec))
    made.write(output)
    report = made.report
    assert report is not None
    removed = None if report.stale_by_length is None else report.stale_by_length.to_pylist()
    names = [name for name in report.__slots__ if name != "stale_by_length"]
    _report(as_json, {name: getattr(report, name) for name in names} | {"stale_by_length": removed})


def _report(as_json: bool, values: dict[str, Any]) -> None:
    if as_json:
        click.echo(json.dumps(values))
        return
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _shown(value))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(", ".join(f"{k} {v:g}" for k, v in row.items()) for row in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
