"""The demonstration: specialists, then a student for each objective, then one page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...errors import BackendError, problem
from .config import OBJECTIVES, Objective, School, StudentConfig
from .results import Run, summarise
from .school import NAMES, steps_of
from .supervisor import Supervisor
from .tasks import DOMAINS

TITLES = {
    "sampled": "log-probabilities of sampled tokens",
    "full_vocabulary": "hidden states, whole vocabulary",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demonstration runs: `student` once for each objective."""

    school: School = field(default_factory=School)
    student: StudentConfig = field(default_factory=StudentConfig)
    objectives: tuple[Objective, ...] = OBJECTIVES

    def configs(self) -> list[StudentConfig]:
        raw = asdict(self.student)
        return [StudentConfig(**raw | {"objective": objective}) for objective in self.objectives]


def run_demo(out: Path, plan: Plan, console: Console) -> dict[str, Any]:
    """Run what is still to be run, write report.html and summary.json into `out`, and return the summary."""
    from .report import mopd_page

    out.mkdir(parents=True, exist_ok=True)
    specialists = make_models(out / "models", plan.school, console)
    runs: dict[str, Run] = {}
    for number, config in enumerate(plan.configs(), 1):
        console.print(
            f"\n[bold]student {number}/{len(plan.objectives)}[/] learns from {TITLES[config.objective]}, "
            f"arm {config.arm}"
        )
        runs[config.objective] = run_student(out, config, out / "models", console)
    summary = {
        "specialists": {d: specialists[d] for d in DOMAINS},
        "runs": {name: summarise(run, specialists) for name, run in runs.items()},
    }
    _print(console, summary)
    _replace(out / "report.html", mopd_page(summary, runs).html())
    _replace(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(f"\nreport   {out / 'report.html'}\nsummary  {out / 'summary.json'}")
    return summary


def make_models(folder: Path, school: School, console: Console) -> dict[str, dict[str, Any]]:
    """The specialists and the student, two at a time; those that are there already are kept.

    Returns:
        What is known of each, by name: greedy accuracy by domain, for a specialist also in MXFP4.
    """
    wanted = json.dumps(asdict(school), sort_keys=True)
    mark = folder / "school.json"
    if mark.is_file() and mark.read_text() != wanted:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        _replace(mark, wanted)  # never empty: another run on the same models would throw them away
    missing = [name for name in NAMES if not (folder / f"{name}.json").is_file()]
    if missing:
        console.print("[bold]specialists[/], and a student that knows the form and little else")
    with _bar(console) as bar:
        queue = [(name, bar.add_task(name, total=steps_of(name, school))) for name in missing]
        taught, lock, failures = iter(queue), threading.Lock(), []

        def work() -> None:
            while True:
                with lock:
                    name, task = next(taught, ("", None))
                if task is None:
                    return
                arguments = [str(folder), name, json.dumps(asdict(school))]
                with (
                    (folder / f"{name}.log").open("wb") as log,
                    subprocess.Popen(
                        [sys.executable, "-m", "rollout_wal.trainers.mopd.school", *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                    ) as process,
                ):
                    assert process.stdout is not None
                    for line in process.stdout:
                        if line.strip().isdecimal():
                            bar.update(task, completed=int(line))
                if process.returncode:
                    failures.append(f"{name} ended with {process.returncode}, see {folder / f'{name}.log'}")

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise BackendError(
            problem(
                "; ".join(failures),
                consequence="There are no teachers, so nothing was distilled",
                remedy="Remedy the cause and run the same again: models that are whole are kept",
            )
        )
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}


def run_student(out: Path, config: StudentConfig, models: Path, console: Console) -> Run:
    """One student's run, or what is left of it. Its folder is named after objective, arm and seed."""
    folder = out / f"{config.objective}-{config.arm}-{config.seed}"
    plan, wanted = folder / "config.json", json.dumps(asdict(config), sort_keys=True)
    if plan.is_file() and plan.read_text() != wanted:
        shutil.rmtree(folder)  # another configuration's rollouts; its log would rightly refuse these
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(wanted)
    with _bar(console, "{task.fields[note]}") as bar:
        task = bar.add_task("batches", total=config.batches, note="")

        def on_batch(line: dict[str, Any]) -> None:
            note = bar.tasks[task].fields["note"]
            if "accuracy" in line:
                note = "  ".join(f"{d} {line['accuracy'][d]:.0%}" for d in DOMAINS)
            done = max(line["batch"], int(bar.tasks[task].completed))
            bar.update(task, completed=done, note=note)

        Supervisor(config, folder, models, on_batch=on_batch).run()
    return Run.load(folder, config)


def _bar(console: Console, *more: str) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, *(TextColumn(m) for m in more), console=Console(stderr=True, quiet=console.quiet))


def _print(console: Console, summary: dict[str, Any]) -> None:
    table = Table(title="greedy accuracy on held-out problems", title_justify="left")
    names: Sequence[str] = ("learns from", "domain", "specialist", "in MXFP4", "before", "after", "share")
    for column in names:
        table.add_column(column, justify="left" if column in ("learns from", "domain") else "right")
    for name, run in summary["runs"].items():
        for domain, d in run["domains"].items():
            tone = "green" if d["reached"] else "red"
            table.add_row(
                TITLES[name],
                domain,
                *(f"{d[key]:.1%}" for key in ("specialist", "teacher_mxfp4", "before", "after")),
                f"[{tone}]{d['share_of_specialist']:.1%}[/]",
            )
    console.print()
    console.print(table)
    for name, run in summary["runs"].items():
        kills = run["kills"]
        console.print(
            f"{TITLES[name]}: killed were {kills['workers']} workers, the trainer {kills['trainer']} times, the "
            f"scoring server {kills['server']} times; {run['interruptions']} rollouts were interrupted, "
            f"{run['seconds_lost']:.0f} of {run['seconds']:.0f} s were lost\nbalance: {run['balance']}"
        )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
