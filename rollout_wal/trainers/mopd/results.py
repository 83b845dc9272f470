"""What came of a run, read from the files that it left: metrics and events."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import StudentConfig
from .student import METRICS, PRECISION
from .supervisor import EVENTS, read_lines
from .tasks import DOMAINS

#: Share of a specialist's accuracy that the student must reach.
GOAL = 0.95


@dataclass(frozen=True, slots=True)
class Run:
    """One student's run.

    Args:
        batches: one entry per batch that was trained on, in order; entry 0 is the student before its first step.
        events: starts and kills of trainer and server.
    """

    config: StudentConfig
    batches: list[dict[str, Any]]
    events: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    done: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, config: StudentConfig) -> Run:
        lines = read_lines(folder / METRICS)
        last = {line["batch"]: line for line in lines}  # a batch that a crash repeated counts once
        done = json.loads((folder / "done.json").read_text())
        return cls(config, [last[n] for n in sorted(last)], read_lines(folder / EVENTS), lines, done)

    @property
    def accuracy(self) -> list[tuple[int, dict[str, float]]]:
        """(optimizer steps, greedy accuracy by domain) of every evaluation."""
        return [(b["step"], b["accuracy"]) for b in self.batches if "accuracy" in b]

    def kills(self, who: str) -> int:
        return sum(e["event"] == "kill" and e["who"] == who for e in self.events)

    @property
    def worker_deaths(self) -> int:
        """Over all lives of the trainer, as far as their metrics tell."""
        by_life: dict[int, int] = {}
        for line in self.lines:
            if "worker_deaths" in line:
                by_life[line["life"]] = line["worker_deaths"]
        return sum(by_life.values())

    @property
    def lost(self) -> list[dict[str, Any]]:
        """What each kill of trainer or server cost: the time between the last new batch before it and the first new
        one after it, less the time that a batch usually takes. Kills in the same gap are one entry."""
        firsts: list[tuple[int, float]] = []
        for line in self.lines:
            if not firsts or line["batch"] > firsts[-1][0]:
                firsts.append((line["batch"], line["time"]))
        gaps = [(a[1], b[1], b[0]) for a, b in itertools.pairwise(firsts)]
        if not gaps:
            return []
        kills = [e for e in self.events if e["event"] == "kill"]
        usual = statistics.median(end - start for start, end, _ in gaps)
        found = []
        for start, end, batch in gaps:
            who = [e["who"] for e in kills if start <= e["time"] < end]
            if who:
                found.append({"batch": batch, "who": who, "seconds": max(0.0, end - start - usual)})
        return found

    @property
    def seconds(self) -> float:
        """From the first start to the last batch."""
        return float(self.lines[-1]["time"] - self.events[0]["time"])


def summarise(run: Run, specialists: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A run as plain numbers.

    Args:
        specialists: by domain, what `school.make` found.
    """
    before, after = run.accuracy[0][1], run.accuracy[-1][1]
    domains = {}
    for domain in DOMAINS:
        specialist = specialists[domain]["accuracy"][domain]
        domains[domain] = {
            "specialist": specialist,
            "teacher_mxfp4": specialists[domain]["accuracy_mxfp4"][domain],
            "before": before[domain],
            "after": after[domain],
            "share_of_specialist": after[domain] / specialist if specialist else 0.0,
            "goal": GOAL,
            "reached": after[domain] >= GOAL * specialist > 0,
        }
    trained = run.batches[1:]
    lost = run.lost
    return {
        "config": asdict(run.config),
        "domains": domains,
        "reached": all(d["reached"] for d in domains.values()),
        "precision": PRECISION,  # every batch was refused unless the provenance of all its scores said so
        "batches": len(trained),
        "steps": trained[-1]["step"],
        "rollouts": sum(b["rollouts"] for b in trained),
        "mean_length": _mean_length(trained),
        "divergence": trained[-1]["divergence"],
        "overlap": trained[-1]["overlap"],
        "kills": {who: run.kills(who) for who in ("trainer", "server")} | {"workers": run.worker_deaths},
        "interruptions": sum(b["interruptions"] for b in trained),
        "censored": sum(b["censored"] for b in trained),
        "batches_repeated": len(run.lines) - len(run.batches),
        "seconds": run.seconds,
        "seconds_lost": sum(entry["seconds"] for entry in lost),
        "lost": lost,
        "seconds_by_station": {
            name: statistics.median(b["seconds"].get(name, 0.0) for b in trained)
            for name in ("weights", "generate", "seal", "score", "load", "train")
        },
        "balance": run.done["balance"],
        "balance_holds": run.done["holds"],
    }


def _mean_length(batches: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens of a rollout by domain, the end of sequence included, over all batches."""
    out: dict[str, float] = {}
    for domain in DOMAINS:
        counts = [sum(column) for column in zip(*(b["lengths"][domain] for b in batches))]
        out[domain] = sum(n * length for length, n in enumerate(counts)) / max(1, sum(counts))
    return out
