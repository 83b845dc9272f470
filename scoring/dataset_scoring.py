"""Scores of a whole dataset, added to it as column groups; killed at any time and run again, it goes on.

Nothing is kept beside the dataset: what is to be done is what its metadata asks for and its column groups lack. Scores
are committed in parts, each of which is there whole or not at all; what had been scored and not committed when a
process died is asked for again, and a server with a cache computes none of it twice.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rollout_wal.dataset import (
    ColumnGroup,
    Dataset,
    DatasetWriter,
    Provenance,
    extras_from_json,
    open_dataset,
    tokens_crc32c,
)
from rollout_wal.errors import ProvenanceError, RolloutWalError

from .client import ScoringClient
from .errors import BadConfiguration, BadResult, ScoringError, problem
from .items import Scores, Wanted
from .routing import Routable, Route, Router, checked, recorded
from .stored import stored_pins, stored_sources
from .tasks import Task, columns_of, groups_of, nbytes, tasks_of, teacher_group

#: Who routed samples whose metadata names no teacher: a column group beside those of the teachers.
ROUTING_GROUP = "routing"

_METADATA = [
    "sample",
    "group",
    "prompt_length",
    "response_length",
    "loss_tokens",
    "domain",
    "teachers",
    "censored",
    "extras",
    "sampling",
    "tokenizer_digest",
    "tokens_crc32c",
]


@dataclass(frozen=True, slots=True)
class ScoringSpec:
    """What to score, and how.

    Args:
        wanted: outputs; see `tasks` for the columns they become.
        router: for samples whose metadata names no teacher. Its decision is recorded in the column group "routing".
        temperature: that teachers' logits are divided by; "sampled": the one that the rollout was drawn with.
        censored: score rollouts that did not end, too.
        prefix: of the names of column groups; another one keeps other outputs, or other checkpoints, apart.
        teacher_prefix: what a teacher reads instead of the tokens before the first one that it scores (privileged
            context, another system prompt); None: what the student read.
        commit_bytes, commit_s: scores are committed when so many bytes wait, or so long has passed.
        failures_max: give up when so many samples could not be scored.
    """

    wanted: Wanted = field(default_factory=Wanted)
    router: Router | None = None
    temperature: float | Literal["sampled"] = 1.0
    censored: bool = False
    prefix: str = ""
    teacher_prefix: Callable[[Routable, str], NDArray[np.int32] | None] | None = None
    commit_bytes: int = 64 << 20
    commit_s: float = 30.0
    failures_max: int = 100


@dataclass(slots=True)
class ScoringReport:
    """What a run did. A *pair* is one sample under one teacher."""

    pairs: int = 0
    """Asked for by the dataset, in all."""
    already: int = 0
    """Were there before this run."""
    scored: int = 0
    committed: int = 0
    tokens: int = 0
    """Scored now, without those read before them."""
    from_cache: int = 0
    fallback: int = 0
    """Scored by another checkpoint than the expected one, as the caller allowed."""
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    """The first ten, by sample."""
    censored: int = 0
    """Samples that were left out because they did not end."""
    unrouted: int = 0
    """Samples without a teacher, or without a sampled token."""
    by_teacher: Counter[str] = field(default_factory=Counter)
    by_server: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    version: int = 0
    """Of the dataset, when it was done."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def score_dataset(
    folder: str | Path,
    client: ScoringClient,
    spec: ScoringSpec | None = None,
    *,
    writer_id: str = "scorer",
    compression: str = "zstd",
    check_fence: Callable[[], None] | None = None,
    on_progress: Callable[[ScoringReport], None] | None = None,
) -> ScoringReport:
    """Score what a dataset asks for and does not have yet.

    Metadata decides: the teachers that a sample's row names score the tokens that its policy sampled, or those that a
    router gave each of them. The order is by teacher, so that each is loaded once, and within one by group, so that a
    prompt is read once for all its rollouts. The checkpoint of a teacher is the one whose scores the dataset has.

    Args:
        client: entered, and used by nobody else meanwhile.
        writer_id, compression, check_fence: as for `DatasetWriter`.
        on_progress: called after every answer.

    Raises:
        DatasetError: the dataset cannot be read, or takes no more.
        ScoreProvenanceMismatch, BadConfiguration: its scores and the ones that are asked for do not go together.
        Unreachable, ScoringError: no server can be reached, or too many samples failed. What was committed stays.
    """
    spec = spec or ScoringSpec()
    started = time.monotonic()
    dataset = open_dataset(folder)
    _check_columns(dataset, spec)
    writer = DatasetWriter(folder, writer_id=writer_id, default_compression=compression, check_fence=check_fence)
    report = ScoringReport()
    plan = _Plan(dataset, spec, report)
    for teacher, checkpoint in stored_pins(dataset, spec.prefix).items():
        client.pins.setdefault(teacher, checkpoint)
    sink = _Sink(writer, spec, report, plan.decided)
    sent: dict[int, Task] = {}

    def items() -> Iterator[Any]:
        for index, (task, item) in enumerate(plan.items()):
            sent[index] = task
            yield item

    for index, outcome in client.score(items()):
        task = sent.pop(index)
        if isinstance(outcome, Scores):
            sink.add(task, outcome)
        else:
            _failed(report, task, outcome, spec)
        if on_progress is not None:
            report.seconds = time.monotonic() - started
            on_progress(report)
    sink.commit()
    report.seconds, report.version = time.monotonic() - started, writer.version
    return report


class _Plan:
    """Which samples go to which teachers, in which order."""

    def __init__(self, dataset: Dataset, spec: ScoringSpec, report: ScoringReport) -> None:
        self._dataset, self._spec = dataset, spec
        self._rows: dict[str, dict[str, Any]] = {}
        self._routes: dict[str, tuple[Route, ...]] = {}
        self.decided: dict[str, ColumnGroup] = {}
        self._todo: list[tuple[str, str]] = []  # (teacher, key)
        routing = spec.prefix + ROUTING_GROUP
        before = stored_sources(dataset, routing)
        done: dict[str, set[str]] = {}
        for row in dataset.metadata(_METADATA).to_pylist():
            key = row["sample"]
            if row["censored"] is not None and not spec.censored:
                report.censored += 1
                continue
            extras = extras_from_json(row["extras"] or "{}")
            routes = recorded(row["teachers"], extras)
            if not routes and spec.router is not None and row["loss_tokens"]:
                routes = self._decide(key, row, extras, before.get(key))
            if not routes or not row["loss_tokens"]:
                report.unrouted += 1
                continue
            self._rows[key], self._routes[key] = row, routes
            for teacher in dict.fromkeys(route.teacher for route in routes):
                report.pairs += 1
                if teacher not in done:
                    done[teacher] = _complete(dataset, groups_of(teacher, spec.wanted, spec.prefix))
                if key in done[teacher]:
                    report.already += 1
                else:
                    self._todo.append((teacher, key))
        self._todo.sort(key=lambda pair: (pair[0], self._rows[pair[1]]["group"], pair[1]))

    def _decide(self, key: str, row: Mapping[str, Any], extras: Mapping[str, Any], before: str | None) -> Any:
        """Ask the router, and see that it is the one who was asked before."""
        router, payload = self._spec.router, self._dataset.payload(key)
        assert router is not None
        assert payload is not None
        seen = Routable(
            key,
            row["domain"],
            row["group"],
            row["prompt_length"],
            payload.array("token_ids"),
            payload.array("segment_kinds"),
            extras,
        )
        decision = checked(router.route(seen), seen)
        name = f"{router.id}@{router.version}"
        if before is not None and before.partition(": ")[0] != name:
            raise BadConfiguration(
                problem(
                    f"sample {key!r} was routed by {before.partition(': ')[0]}; this router is {name}",
                    consequence="Nothing was scored: teachers that two routers chose would be mixed",
                    remedy="Use the same router, or another `prefix` for the column groups",
                )
            )
        if before is None:
            count = sum(r.covers(len(seen.token_ids)).astype(np.uint8) for r in decision.routes)
            source = Provenance(f"{name}: {decision.reason}")
            self.decided[key] = ColumnGroup(
                {"teachers": np.asarray(count, np.uint8) * np.ones(len(seen.token_ids), np.uint8)},
                source,
                row["tokens_crc32c"],
            )
        return decision.routes

    def items(self) -> Iterator[tuple[Task, Any]]:
        """What to send, read from the dataset as it goes."""
        spec = self._spec
        for teacher, key in self._todo:
            row, payload = self._rows[key], self._dataset.payload(key)
            assert payload is not None
            tokens: NDArray[np.int32] = payload.array("token_ids")
            if tokens_crc32c(tokens) != row["tokens_crc32c"]:
                raise BadResult(
                    problem(
                        f"the tokens of sample {key!r} have checksum {tokens_crc32c(tokens):#010x}; its metadata says "
                        f"{row['tokens_crc32c']:#010x}",
                        consequence="Nothing more was scored",
                        remedy="Run `rollout-wal dataset verify`",
                    )
                )
            found = tasks_of(key, tokens, payload.array("loss_mask").astype(np.bool_), self._routes[key])
            task = next((t for t in found if t.teacher == teacher), None)
            if task is None:
                continue  # its part of the sample holds no sampled token
            context = None
            if spec.teacher_prefix is not None:
                kinds = payload.array("segment_kinds")
                extras = extras_from_json(row["extras"] or "{}")
                seen = Routable(key, row["domain"], row["group"], row["prompt_length"], tokens, kinds, extras)
                context = spec.teacher_prefix(seen, teacher)
            temperature = spec.temperature
            if temperature == "sampled":
                temperature = float(json.loads(row["sampling"] or "{}").get("temperature", 1.0))
            yield (
                task,
                task.item(
                    spec.wanted,
                    temperature=temperature,
                    expected=Provenance(teacher, tokenizer_digest=row["tokenizer_digest"]),
                    teacher_prefix_ids=context,
                ),
            )


class _Sink:
    """Collects columns and commits them in parts."""

    def __init__(
        self, writer: DatasetWriter, spec: ScoringSpec, report: ScoringReport, decided: Mapping[str, ColumnGroup]
    ) -> None:
        self._writer, self._spec, self._report, self._decided = writer, spec, report, decided
        self._waiting: dict[str, dict[str, ColumnGroup]] = {}
        self._pairs = self._bytes = 0
        self._since = time.monotonic()

    def add(self, task: Task, scores: Scores) -> None:
        groups = task.columns(scores, self._spec.wanted, self._spec.prefix)
        for name, group in groups.items():
            self._waiting.setdefault(name, {})[task.key] = group
        self._pairs += 1
        self._bytes += nbytes(groups)
        r = self._report
        r.scored += 1
        r.tokens += int(scores.valid.sum())
        r.from_cache += scores.from_cache
        r.fallback += scores.fallback
        r.by_teacher[task.teacher] += 1
        r.by_server[scores.server] += 1
        if self._bytes >= self._spec.commit_bytes or time.monotonic() - self._since >= self._spec.commit_s:
            self.commit()

    def commit(self) -> None:
        keys = {key for columns in self._waiting.values() for key in columns}
        if decided := {key: self._decided[key] for key in keys if key in self._decided}:
            # Before any score that follows from it: a score without a record of who routed it must never be.
            self._writer.add_columns(self._spec.prefix + ROUTING_GROUP, decided)
        for name, columns in self._waiting.items():
            self._writer.add_columns(name, columns)
        self._report.committed += self._pairs
        self._waiting.clear()
        self._pairs = self._bytes = 0
        self._since = time.monotonic()


def _failed(report: ScoringReport, task: Task, error: RolloutWalError, spec: ScoringSpec) -> None:
    report.failed += 1
    if len(report.failures) < 10:
        report.failures.append(f"{task.key} under {task.teacher}: {error}")
    if report.failed >= spec.failures_max:
        kind = ProvenanceError if isinstance(error, ProvenanceError) else ScoringError
        raise kind(
            problem(
                f"{report.failed} samples could not be scored, the last one because {error}",
                consequence=f"Scoring stopped; {report.committed} pairs were committed and stay",
                remedy="Remedy the cause and run the same again: it goes on",
            )
        )


def _check_columns(dataset: Dataset, spec: ScoringSpec) -> None:
    """A group's columns are fixed by its first commit: see before scoring for an hour that they are the same."""
    wanted = spec.wanted
    if not (wanted.logprobs or wanted.top_k or wanted.entropy or wanted.hidden_states):
        raise BadConfiguration(
            problem("no output was asked for", consequence="Nothing was scored", remedy="Ask for one, such as logprobs")
        )
    start = teacher_group("", spec.prefix)
    for name in dataset.groups:
        if not name.startswith(start):
            continue
        known = {c.name: c.width for c in dataset.state.groups[name].columns}
        asked = columns_of(wanted)
        if asked != {"weight"} and (set(known) != asked or known.get("topk_ids", 0) != wanted.top_k):
            raise BadConfiguration(
                problem(
                    f"the column group {name!r} of {dataset.folder} has the columns {sorted(known)} "
                    f"(top {known.get('topk_ids', 0)}); asked for are {sorted(asked)} (top {wanted.top_k})",
                    consequence="Nothing was scored",
                    remedy="Ask for the same outputs, or give the new ones a `prefix` of their own",
                )
            )


def _complete(dataset: Dataset, groups: list[str]) -> set[str]:
    """Keys that have all of these column groups."""
    found = [dataset.keys_with(name) if name in dataset.groups else set() for name in groups]
    return set.intersection(*found) if found else set()
