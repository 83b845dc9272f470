"""`rollout-wal audit run log`: this project's own backend, its workers killed, against an uninterrupted run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import Progress

from .command_options import finish, shared
from .command_run import read_prompts


@click.command("log")
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False), help="A local model folder.")
@click.option(
    "--prompts",
    "prompt_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL; each line holds "prompt_token_ids", a list of token ids.',
)
@click.option("--copies", default=8, show_default=True, help="Rollouts per prompt.")
@click.option("--interrupt-every", required=True, type=float, help="Mean seconds between the kills of a worker.")
@click.option("--workers", default=1, show_default=True, help="Worker processes.")
@click.option("--slots", default=32, show_default=True, help="Rollouts that a worker runs at once.")
@click.option("--max-tokens", default=256, show_default=True, help="Longest completion.")
@click.option("--min-tokens", default=0, show_default=True, help="No end of sequence before that many tokens.")
@click.option("--temperature", default=1.0, show_default=True, help="Of the sampler.")
@click.option(
    "--noise",
    type=click.Choice(["attempt", "position"]),
    default="attempt",
    show_default=True,
    help="Fresh at each resume, or by position: then rollouts are compared token for token too.",
)
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds for each of the two runs.")
@shared
def log(
    model: str,
    prompt_file: Path,
    copies: int,
    interrupt_every: float,
    workers: int,
    slots: int,
    max_tokens: int,
    min_tokens: int,
    temperature: float,
    noise: Literal["attempt", "position"],
    timeout: float,
    margin: float,
    power: float,
    out: Path | None,
    as_json: bool,
    fail_on_bias: bool,
    seed: int,
) -> None:
    """The log with output commit: once in peace, once with its workers killed with and without notice.

    The logs of both runs are kept in a temporary folder and removed.
    """
    from ..backend import PoisonRule, RolloutBackend
    from ..params import SamplingParams
    from .adapters.log import LogBackend
    from .backends import BackendRun, Interrupter, identical_rollouts, run_backend
    from .compare import Settings, compare
    from .hypotheses import closed_cohort, independent_loss, output_commit, single_noise
    from .report import Audit

    prompts = read_prompts(prompt_file)
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature)

    def measure(folder: str, interrupter: Interrupter, label: str, first_seed: int) -> BackendRun:
        with RolloutBackend(
            model, Path(folder) / label, workers=workers, slots=slots, segment_bytes=4 << 20, poison=PoisonRule(1000)
        ) as backend:
            audited = LogBackend(backend, noise=noise, seed=seed)
            try:
                with Progress(console=Console(stderr=True), transient=True) as progress:
                    task = progress.add_task(label, total=len(prompts) * copies)
                    return run_backend(
                        audited,
                        prompts,
                        sampling,
                        copies=copies,
                        seed=first_seed,
                        interrupter=interrupter,
                        timeout_seconds=timeout,
                        progress=lambda done: progress.update(task, completed=done),
                    )
            finally:
                audited.close()

    keyed = noise == "position"
    with tempfile.TemporaryDirectory() as folder:
        calm = measure(folder, Interrupter(None), "uninterrupted", seed)
        # Fresh noise must be other noise: the two runs are independent samples. Keyed noise must be the same.
        first_seed = seed if keyed else seed + 2**40
        kinds = Interrupter(interrupt_every, ("kill", "preempt"), seed=seed)
        hit = measure(folder, kinds, "interrupted", first_seed)
    settings = Settings(margin=margin, quantile_margin=2 * margin, power=power, seed=seed)
    comparison = compare(
        "wal_keyed" if keyed else "wal",
        hit.table,
        calm.table,
        settings=settings,
        hypotheses=(
            # The order of durability and delivery is what the conformance suite looks at, from outside.
            output_commit(None),
            closed_cohort(hit.table, begun=len(prompts) * copies),
            independent_loss(None),
            single_noise(None, identical=identical_rollouts(hit, calm) if keyed else None),
        ),
    )
    note = (
        f"{hit.interruptions_made} interruptions in {hit.seconds:,.0f} s; without them it took {calm.seconds:,.0f} s."
    )
    audited = Audit(f"Length-bias audit of the log with {Path(model).name}", model, (comparison,), settings, (note,))
    finish(audited, out, as_json, fail_on_bias)
