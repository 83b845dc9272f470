"""`rollout-wal score`: teachers' scores for a dataset; run again after any crash, it goes on."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from .dataset_scoring import ScoringReport
    from .items import Wanted

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def read_outputs(text: str) -> Wanted:
    """`logprobs,topk=64,entropy,hidden` as `Wanted`. Raises click.BadParameter."""
    from .items import Wanted

    chosen: dict[str, Any] = {"logprobs": False}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name in ("logprobs", "entropy") and not number:
            chosen[name] = True
        elif name in ("hidden", "hidden_states") and not number:
            chosen["hidden_states"] = True
        elif name == "topk" and re.fullmatch(r"[1-9][0-9]{0,5}", number):
            chosen["top_k"] = int(number)
        else:
            raise click.BadParameter(f"{part.strip()!r} is none of logprobs, topk=K, entropy, hidden")
    return Wanted(**chosen)


def read_routes(pairs: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """`DOMAIN=TEACHER` or `DOMAIN=TEACHER:0.8+OTHER:0.2`, `*` being every other domain: (table, default)."""
    table: dict[str, Any] = {}
    for pair in pairs:
        domain, equals, text = pair.partition("=")
        choice: dict[str, float] = {}
        for part in text.split("+"):
            teacher, _, weight = part.partition(":")
            try:
                choice[teacher] = float(weight) if weight else 1.0
            except ValueError:
                raise click.BadParameter(f"{weight!r} in {pair!r} is no weight") from None
        if not equals or "" in choice:
            raise click.BadParameter(f"{pair!r} is not DOMAIN=TEACHER or DOMAIN=TEACHER:WEIGHT+TEACHER:WEIGHT")
        table[domain] = choice
    return table, table.pop("*", None)


@click.command(context_settings={"show_default": True})
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--server", "servers", multiple=True, required=True, help="host:port; several share the work.")
@click.option(
    "--outputs",
    default="logprobs",
    help="What to compute at each sampled token: logprobs, topk=K (with the mass of the rest), entropy, hidden "
    "(last-layer states in bfloat16), separated by commas.",
)
@click.option(
    "--route",
    "routes",
    multiple=True,
    metavar="DOMAIN=TEACHER",
    help="Teachers of samples whose metadata names none: math=t1, or weighted, code=t1:0.8+t2:0.2; '*' is every other "
    "domain. May be given several times.",
)
@click.option("--temperature", default="1.0", help="Of the teachers' logits; 'sampled': the one each rollout had.")
@click.option("--censored", is_flag=True, help="Score rollouts that did not end, too.")
@click.option("--prefix", default="", help="Before the names of column groups, to keep several scorings apart.")
@click.option(
    "--other-checkpoints", is_flag=True, help="Take scores of another checkpoint if the expected one is down."
)
@click.option("--tls", "authorities", type=_FILE, help="Encrypt, and check servers against this PEM file.")
@click.option("--tls-certificate", "certificate", type=_FILE, help="PEM file to show to servers (mTLS).")
@click.option("--tls-key", "private_key", type=_FILE, help="Its private key.")
@click.option("--tls-name", "server_name", default="", help="The name in servers' certificates, if it is another.")
@click.option("--token-file", type=_FILE, help="File that holds the bearer token. Or set ROLLOUT_WAL_SCORING_TOKEN.")
@click.option("--window", default=128, help="Items in flight to each server.")
@click.option("--patience", default=300.0, help="Seconds to wait for a server that is down or full.")
@click.option("--commit-seconds", default=30.0, help="How often what was scored is made durable.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object; no progress bar.")
def score(
    dataset: Path,
    servers: tuple[str, ...],
    outputs: str,
    routes: tuple[str, ...],
    temperature: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Score the rollouts of DATASET under teachers, and add the scores to it.

    The teachers of a sample are those that its metadata names, or that --route gives its domain. Only tokens that the
    policy sampled are scored. Scores become the column group teacher.NAME (columns logprobs, topk_ids, topk_logprobs,
    tail_mass, entropy, weight) and hidden states hidden.NAME; the rest of the dataset is not touched.

    Kill it at any time and run the same command again: it scores what is not there yet. A result that is damaged, is
    of other tokens, or comes from another checkpoint than the dataset's scores so far is refused, and asked for again.

    \b
    rollout-wal generate models/student prompts.jsonl out -n 8
    rollout-wal serve-teachers teachers.yaml &
    rollout-wal score out/dataset --server localhost:50151 --route math=t-math --outputs logprobs,topk=64
    """
    from rollout_wal.errors import RolloutWalError

    from .client import ClientOptions, ScoringClient
    from .dataset_scoring import ScoringSpec, score_dataset
    from .routing import DomainRouter

    table, default = read_routes(routes)
    try:
        heat: float | Literal["sampled"] = "sampled" if temperature == "sampled" else float(temperature)
    except ValueError:
        raise click.BadParameter(f"{temperature!r} is neither a number nor 'sampled'") from None
    spec = ScoringSpec(
        wanted=read_outputs(outputs),
        router=DomainRouter(table, default=default) if routes else None,
        temperature=heat,
        censored=options["censored"],
        prefix=options["prefix"],
        commit_s=options["commit_seconds"],
    )
    shown: AbstractContextManager[Callable[[ScoringReport], None] | None] = nullcontext()
    if not as_json and sys.stderr.isatty():
        shown = ScoreProgress()
    try:
        client_options = ClientOptions(
            token=_token(options["token_file"]),
            authorities=options["authorities"],
            certificate=options["certificate"],
            private_key=options["private_key"],
            server_name=options["server_name"],
            window=options["window"],
            patience_s=options["patience"],
            other_checkpoints=options["other_checkpoints"],
        )
        with ScoringClient(servers, client_options) as client, shown as on_progress:
            report = score_dataset(dataset, client, spec, writer_id=f"score-{os.getpid()}", on_progress=on_progress)
    except RolloutWalError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"dataset": str(dataset), **report.to_dict()}))
    else:
        click.echo(
            f"{dataset}: {report.committed} scored now ({report.tokens} tokens in {report.seconds:.1f} s), "
            f"{report.already} before, of {report.pairs}"
        )
        for what in ("fallback", "censored", "unrouted", "failed"):
            if count := getattr(report, what):
                click.echo(f"{count} {_EXPLAINED[what]}")
        for failure in report.failures:
            click.echo(f"failed: {failure}", err=True)
    if report.failed:
        sys.exit(1)


_EXPLAINED: Mapping[str, str] = {
    "fallback": "were scored by another checkpoint than the expected one",
    "censored": "samples were left out because they did not end (--censored takes them)",
    "unrouted": "samples have no teacher or no sampled token (--route gives them one)",
    "failed": "failed; run the command again to try them once more",
}


def _token(path: Path | None) -> str:
    return path.read_text().strip() if path else os.environ.get("ROLLOUT_WAL_SCORING_TOKEN", "")


class ScoreProgress:
    """The progress bar, on standard error. A context manager that gives the function to report to."""

    def __init__(self) -> None:
        import rich.progress
        from rich.console import Console

        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("scoring"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]} tok/s"),
            rich.progress.TextColumn("{task.fields[now]}"),
            rich.progress.TextColumn("durable {task.fields[durable]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._shown_s = 0.0

    def __enter__(self) -> Callable[[ScoringReport], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, report: ScoringReport) -> None:
        done = report.already + report.scored + report.failed
        if time.monotonic() - self._shown_s < 0.1 and done < report.pairs:
            return
        self._shown_s = time.monotonic()
        now = " ".join(f"{t}:{n}" for t, n in report.by_teacher.most_common(3))
        fields: dict[str, Any] = {
            "rate": f"{report.tokens / max(report.seconds, 1e-6):,.0f}",
            "now": now,
            "durable": report.committed,
        }
        if self._task is None:
            self._task = self._bar.add_task("", total=report.pairs, **fields)
        self._bar.update(self._task, completed=done, **fields)


if __name__ == "__main__":
    score()
