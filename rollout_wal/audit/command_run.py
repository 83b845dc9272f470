"""`rollout-wal audit run`: a backend under interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from ..errors import AuditError, problem
from .command_options import finish, laws, parse_policy, shared
from .lengths import parse_lengths
from .schedules import parse_interruptions


@click.group()
def run() -> None:
    """Run a backend under interruptions and compare what it delivers."""


@run.command("simulated")
@laws
@click.option(
    "--rollouts",
    default=0,
    help="Rollouts per policy; by default as many as the power for the mean asks for, from a pilot.",
)
@click.option("--slots-per-worker", default=1, show_default=True, help="Rollouts that one interruption hits together.")
@shared
def simulated(
    lengths: tuple[str, ...],
    interruptions: str,
    policies: tuple[str, ...],
    lag: int,
    rollouts: int,
    slots_per_worker: int,
    margin: float,
    power: float,
    out: Path | None,
    as_json: bool,
    fail_on_bias: bool,
    seed: int,
) -> None:
    """A simulated fleet, compared with the exact law.

    \b
    rollout-wal audit run simulated --interruptions spot:0.01,30 --policy restart --policy wal --out report
    """
    from .compare import Settings
    from .report import Audit
    from .simulated import rollouts_for_power, simulated_comparison

    law_of = [parse_lengths(text) for text in lengths]
    process = replace(parse_interruptions(interruptions), slots_per_worker=slots_per_worker)
    settings = Settings(margin=margin, quantile_margin=2 * margin, power=power, seed=seed)
    comparisons = []
    for text in policies:
        policy = parse_policy(text, lag)
        count = rollouts or rollouts_for_power(law_of, process, policy, settings=settings, seed=seed + 1)
        comparisons.append(simulated_comparison(law_of, process, policy, rollouts=count, settings=settings, seed=seed))
    audited = Audit(
        "Length-bias audit of a simulated fleet",
        f"Lengths {', '.join(lengths)}; {process.label}; durability lag {lag} steps",
        tuple(comparisons),
        settings,
        notes=("Every token was drawn with its own noise; the reference is the exact law, without sampling error.",),
    )
    finish(audited, out, as_json, fail_on_bias)


@run.command("completions")
@click.option("--url", required=True, help="Base URL of the server, version included: http://127.0.0.1:8000/v1")
@click.option("--model", required=True, help="The model, as the server names it.")
@click.option(
    "--prompts",
    "prompt_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL; each line holds "prompt_token_ids", a list of token ids.',
)
@click.option("--copies", default=8, show_default=True, help="Rollouts per prompt.")
@click.option("--interrupt-every", required=True, type=float, help="Mean seconds between interruptions.")
@click.option("--slots", default=8, show_default=True, help="Requests in flight, all lost together.")
@click.option("--max-tokens", default=256, show_default=True, help="Longest completion.")
@click.option("--temperature", default=1.0, show_default=True, help="Of the sampler.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token, if the server wants one.")
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds for each of the two runs.")
@shared
def completions(
    url: str,
    model: str,
    prompt_file: Path,
    copies: int,
    interrupt_every: float,
    slots: int,
    max_tokens: int,
    temperature: float,
    api_key: str | None,
    timeout: float,
    margin: float,
    power: float,
    out: Path | None,
    as_json: bool,
    fail_on_bias: bool,
    seed: int,
) -> None:
    """A server with an OpenAI-compatible completion endpoint: once in peace, once with its connections dropped.

    This shows what a rollout loop that starts again from scratch would make of that server's completions.
    """
    from ..params import SamplingParams
    from .adapters.openai import CompletionSource, completion_backend
    from .backends import BackendRun, Interrupter, run_backend
    from .compare import Settings, compare
    from .estimate import hazard_per_token, restart_prediction
    from .hypotheses import closed_cohort, independent_loss, output_commit, single_noise
    from .report import Audit

    prompts = read_prompts(prompt_file)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    source = CompletionSource(url, model, api_key)

    def measure(interrupter: Interrupter, label: str, first_seed: int) -> BackendRun:
        backend = completion_backend(source, slots=slots)
        try:
            with Progress(console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task(label, total=len(prompts) * copies)
                return run_backend(
                    backend,
                    prompts,
                    sampling,
                    copies=copies,
                    seed=first_seed,
                    interrupter=interrupter,
                    timeout_seconds=timeout,
                    progress=lambda done: progress.update(task, completed=done),
                )
        finally:
            backend.close()

    calm = measure(Interrupter(None), "uninterrupted", seed)
    # Other seeds: the two runs must be independent samples.
    hit = measure(Interrupter(interrupt_every, seed=seed), "interrupted", seed + 2**40)
    settings = Settings(margin=margin, quantile_margin=2 * margin, power=power, seed=seed)
    comparison = compare(
        "restart",
        hit.table,
        calm.table,
        settings=settings,
        prediction=restart_prediction(calm.table, hazard_per_token(hit.table)),
        hypotheses=(
            output_commit(len(hit.table)),
            closed_cohort(hit.table, begun=len(prompts) * copies),
            independent_loss(None),
            single_noise(None),
        ),
    )
    note = (
        f"{hit.interruptions_made} interruptions in {hit.seconds:,.0f} s; without them it took {calm.seconds:,.0f} s."
    )
    audited = Audit(f"Length-bias audit of {model}", url, (comparison,), settings, notes=(note,))
    finish(audited, out, as_json, fail_on_bias)


def read_prompts(path: Path) -> list[list[int]]:
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tokens = json.loads(line)["prompt_token_ids"]
            prompts.append([int(t) for t in tokens])
        except (ValueError, LookupError, TypeError) as error:
            raise AuditError(
                problem(
                    f"line {number} of {path} holds no prompt_token_ids",
                    consequence="Nothing was run",
                    remedy='Write one JSON object per line, as in {"prompt_token_ids": [1, 2, 3]}',
                )
            ) from error
    if not prompts:
        raise AuditError(problem(f"{path} holds no prompts", consequence="Nothing was run", remedy="Add some"))
    return prompts
