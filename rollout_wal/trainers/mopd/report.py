"""The page of the demonstration: one file, no network, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...audit import plots
from ...audit.html import Cell, Page
from .results import GOAL, Run
from .tasks import DOMAINS

_COLOURS = {"addition": 1, "sorting": 2}
_LEARNS = {"sampled": "sampled log-probabilities", "full_vocabulary": "hidden states, full vocabulary"}


def mopd_page(summary: Mapping[str, Any], runs: Mapping[str, Run]) -> Page:
    """The page, for its HTML or Markdown.

    Args:
        summary: what summary.json holds.
        runs: by objective, as in the summary.
    """
    page = Page(
        "Two teachers, one student, and everything is killed",
        "Multi-teacher on-policy distillation: rollouts through the log, scores over gRPC from MXFP4 teachers",
    )
    found = summary["runs"]
    for name, run in found.items():
        worst = min(d["share_of_specialist"] for d in run["domains"].values())
        page.tile(_LEARNS[name], f"{worst:.1%}", tone="good" if run["reached"] else "bad")
    page.tile("Processes killed", f"{sum(sum(r['kills'].values()) for r in found.values()):,}")
    page.tile("Rollouts interrupted", f"{sum(r['interruptions'] for r in found.values()):,}")
    page.tile(
        "Every rollout accounted for",
        "yes" if all(r["balance_holds"] for r in found.values()) else "no",
        tone="good" if all(r["balance_holds"] for r in found.values()) else "bad",
    )
    _learned(page, found)
    for name, run in runs.items():
        _one(page, name, run, found[name])
    _made(page, found)
    return page


def _learned(page: Page, found: Mapping[str, Any]) -> None:
    section = page.section("What the student learned")
    section.prose(
        "Greedy accuracy on problems that neither teachers nor student were trained on, judged by the verifiers of "
        "reasoning-gym. The tiles show the lower of the two shares of the specialists' accuracy."
    )
    rows = []
    for name, run in found.items():
        for domain, d in run["domains"].items():
            rows.append(
                [
                    Cell(_LEARNS[name]),
                    Cell(domain, swatch=_COLOURS[domain]),
                    *(Cell(f"{d[key]:.1%}") for key in ("specialist", "teacher_mxfp4", "before", "after")),
                    Cell(f"{d['share_of_specialist']:.1%}", tone="good" if d["reached"] else "bad"),
                ]
            )
    section.table(
        ["learns from", "domain", "specialist", "its MXFP4 teacher", "before", "after", "share of specialist"], rows
    )


def _one(page: Page, name: str, run: Run, found: Mapping[str, Any]) -> None:
    trained = run.batches[1:]
    steps = [b["step"] for b in trained]
    by_batch = {b["batch"]: b["step"] for b in run.batches}
    hit = [by_batch.get(entry["batch"], 0) for entry in found["lost"]]
    section = page.section(f"Learning from {_LEARNS[name]}, arm {run.config.arm}")
    goals = [GOAL * d["specialist"] for d in found["domains"].values()]
    evaluated = [step for step, _ in run.accuracy]
    section.figure(
        plots.lines(
            f"accuracy-{name}",
            [
                *((d, _COLOURS[d], evaluated, [a[d] for _, a in run.accuracy]) for d in DOMAINS),
                *(
                    (f"{GOAL:.0%} of each specialist" if not i else "_", 0, [0, evaluated[-1]], [goal, goal])
                    for i, goal in enumerate(goals)
                ),
            ],
            x="optimizer steps",
            y="greedy accuracy",
            marks=hit,
            percent=True,
        ),
        "Accuracy by domain. Vertical lines: the trainer or the scoring server was killed.",
    )
    started = run.events[0]["time"]
    section.figure(
        plots.lines(
            f"time-{name}",
            [
                (
                    "batches",
                    3,
                    [0.0, *((b["time"] - started) / 60 for b in run.lines)],
                    [0, *(b["batch"] for b in run.lines)],
                )
            ],
            x="minutes since the start",
            y="batches trained on",
            marks=[(e["time"] - started) / 60 for e in run.events if e["event"] == "kill"],
        ),
        "Where the time went. Vertical lines: the trainer or the scoring server was killed; where the curve falls, the "
        "trainer went back to its last checkpoint.",
    )
    section.figure(
        plots.shares(
            f"lengths-{name}",
            [(d, _COLOURS[d], [b["lengths"][d] for b in trained]) for d in DOMAINS],
            x="generation batch",
            y="tokens of a rollout",
        ),
        "Lengths of the rollouts of each batch, the end of sequence included. Darker is more.",
    )
    section.figure(
        plots.lines(
            f"overlap-{name}",
            [(d, _COLOURS[d], steps, [b["overlap"].get(d, float("nan")) for b in trained]) for d in DOMAINS],
            x="optimizer steps",
            y="overlap with the teacher",
            percent=True,
        ),
        "Share of the teacher's four likeliest tokens that are among the student's, on the student's prefixes.",
    )
    section.figure(
        plots.lines(
            f"stale-{name}",
            [
                ("mean", 3, steps, [sum(b["steps_behind"]) / len(b["steps_behind"]) for b in trained]),
                ("largest", 4, steps, [max(b["steps_behind"]) for b in trained]),
                ("policy versions", 5, steps, [max(b["versions_behind"]) for b in trained]),
            ],
            x="optimizer steps",
            y="steps behind",
        ),
        "Staleness: optimizer steps since the batch's policy version was handed over, when its tokens are learnt from; "
        "and by how many versions the oldest token of a batch, as logged, is behind that version. A worker's death in "
        "the middle of a batch makes no token older.",
    )
    if found["interruptions"]:
        section.figure(
            plots.lines(
                f"hurt-{name}",
                [("interruptions", 5, steps, [b["interruptions"] for b in trained])],
                x="optimizer steps",
                y="per batch",
            ),
            "Interruptions that the rollouts of each batch survived: deaths of a worker, alone or with the trainer.",
        )
    kills = found["kills"]
    section.table(
        ["killed", "times", "seconds lost"],
        [
            [Cell("rollout workers"), Cell(f"{kills['workers']}"), Cell("–", note="within the batches' own time")],
            *(
                [
                    Cell(who),
                    Cell(f"{kills[who]}"),
                    Cell(f"{sum(e['seconds'] for e in found['lost'] if e['who'][0] == who):.1f}"),
                ]
                for who in ("trainer", "server")
            ),
        ],
        "Time lost: from the last new batch before a kill to the first new one after it, less what a batch usually "
        f"takes. {found['seconds_lost']:.0f} of {found['seconds']:.0f} s in all; {found['batches_repeated']} batches "
        "were trained on again from a checkpoint, with the same rollouts.",
    )


def _made(page: Page, found: Mapping[str, Any]) -> None:
    section = page.section("How this was made")
    section.prose(
        "Specialists and student are Llamas of 3 layers over characters, made by supervised examples in this run. "
        "The specialists were packed as MXFP4 and served by `rollout-wal serve-teachers`. Every batch went through the "
        "log, an Arrow dataset, the teachers, a plan and the loader; a batch whose scores do not all say `mxfp4` "
        "in their provenance is refused."
    )
    stations = ("weights", "generate", "seal", "score", "load", "train")
    section.table(
        ["median seconds of a batch", *stations],
        [
            [Cell(_LEARNS[name]), *(Cell(f"{run['seconds_by_station'][s]:.2f}") for s in stations)]
            for name, run in found.items()
        ],
    )
    for name, run in found.items():
        section.prose(f"Balance, {_LEARNS[name]}: {run['balance']}.")
