"""Planning an epoch from metadata alone: which samples, in which step, on which rank, packed with whom.

The order of the epoch follows from (dataset version, spec, epoch) and nothing else: planning again gives the same plan,
so a job resumes from its step counter.

Shape legend: N = samples that are planned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .arrange import arrange
from .errors import DatasetError, problem
from .freshness import Freshness, removed_by_length
from .packing import best_fit_decreasing
from .plan import PLAN_SCHEMA, Plan
from .reader import Dataset
from .whole_groups import pack_groups


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What an epoch looks like.

    Args:
        token_budget: tokens of one packed row: what one rank takes at once.
        ranks: data-parallel ranks.
        bins_per_rank: packed rows per rank and step (gradient accumulation).
        seed: of the shuffle.
        epoch: another epoch is another order under the same seed.
        filter: a pyarrow compute expression over metadata columns; rows for which it is not true are left out.
        filter_columns: the metadata columns that `filter` names.
        freshness: a window over policy versions; None keeps all.
        censored: plan rollouts that were delivered censored, too.
        too_long: what to do with a sample longer than the budget: "error"; "skip" it; or give it an "own_batch",
            a row longer than the budget, together with its like in a step.
        by_teacher: pack only samples with the same teachers together and order a rank's rows by teacher, so that
            each teacher's head is needed once per step. Without teachers it changes nothing.
        packing: "best_fit" or "none" (one sample per row).
        whole_groups: keep the samples of a group (metadata column `group`) in one step, so that a group's baseline and
            its gradient belong to the same update. Rows may then mix teachers. What was filtered out, stale or too long
            is left out of its group; the rest stays together.
    """

    token_budget: int
    ranks: int = 1
    bins_per_rank: int = 1
    seed: int = 0
    epoch: int = 0
    filter: Any = None
    filter_columns: tuple[str, ...] = ()
    freshness: Freshness | None = None
    censored: bool = False
    too_long: Literal["error", "skip", "own_batch"] = "error"
    by_teacher: bool = True
    packing: Literal["best_fit", "none"] = "best_fit"
    whole_groups: bool = False

    def __post_init__(self) -> None:
        counts_ok = min(self.token_budget, self.ranks, self.bins_per_rank) >= 1 and min(self.seed, self.epoch) >= 0
        names_ok = self.too_long in ("error", "skip", "own_batch") and self.packing in ("best_fit", "none")
        if self.whole_groups and (self.packing == "none" or self.too_long == "own_batch"):
            raise DatasetError(
                problem(
                    f"whole_groups does not go with packing={self.packing!r} and too_long={self.too_long!r}",
                    consequence="Nothing was planned",
                    remedy="Use packing='best_fit', and too_long='error' or 'skip'",
                )
            )
        if not counts_ok or not names_ok:
            raise DatasetError(
                problem(
                    f"{self!r} cannot be planned",
                    consequence="Nothing was planned",
                    remedy="token_budget, ranks and bins_per_rank are at least 1, seed and epoch at least 0, too_long "
                    "is 'error', 'skip' or 'own_batch', packing 'best_fit' or 'none'",
                )
            )

    @property
    def columns(self) -> list[str]:
        """The metadata columns that planning reads."""
        names = ["sample", "prompt_length", "response_length", "teachers", "censored", *self.filter_columns]
        if self.freshness is not None:
            names += self.freshness.columns
        if self.whole_groups:
            names.append("group")
        return list(dict.fromkeys(names))

    def describe(self) -> dict[str, Any]:
        """Plain types: kept with the plan."""
        fresh = self.freshness
        return {
            "token_budget": self.token_budget,
            "ranks": self.ranks,
            "bins_per_rank": self.bins_per_rank,
            "seed": self.seed,
            "epoch": self.epoch,
            "filter": None if self.filter is None else str(self.filter),
            "freshness": None
            if fresh is None
            else {
                "current_version": fresh.current_version,
                "max_lag": fresh.max_lag,
                "by": fresh.by,
                "min_fresh_share": fresh.min_fresh_share,
            },
            "censored": self.censored,
            "too_long": self.too_long,
            "by_teacher": self.by_teacher,
            "packing": self.packing,
            "whole_groups": self.whole_groups,
        }


@dataclass(slots=True)
class PlanReport:
    """What planning left out, and how well the rest fits.

    Args:
        samples, planned: before and after everything that leaves samples out.
        tokens: planned.
        filtered, censored, stale, skipped_too_long: samples left out, each counted once, in this order.
        own_batch: samples longer than the budget that are planned by themselves.
        steps: of the epoch.
        packing_fill: planned tokens that fit the budget / (rows they are in × budget).
        rank_imbalance: the worst step's most tokens of a rank / mean of its ranks; 1.0 is even. Steps of samples
            longer than the budget are left out.
        stale_by_length: what the freshness window removed; see `removed_by_length`. None without a window.
    """

    samples: int = 0
    planned: int = 0
    tokens: int = 0
    filtered: int = 0
    censored: int = 0
    stale: int = 0
    skipped_too_long: int = 0
    own_batch: int = 0
    steps: int = 0
    packing_fill: float = 1.0
    rank_imbalance: float = 1.0
    stale_by_length: Any = field(default=None)


def plan(dataset: Dataset, spec: PlanSpec) -> Plan:
    """Plan one epoch. Reads the metadata columns in `spec.columns` and nothing else.

    Raises:
        DatasetError: the spec names columns that there are not, or a sample is longer than the budget and
            `too_long` is "error".
    """
    metadata = dataset.metadata(spec.columns)
    identity = {"dataset": dataset.state.dataset, "version": dataset.version}
    return plan_table(metadata, spec, identity)


def plan_table(metadata: Any, spec: PlanSpec, identity: dict[str, Any]) -> Plan:
    """`plan` over a metadata table that is in memory; row numbers are the table's.

    Args:
        identity: what the row numbers belong to: {"dataset": id, "version": manifest version}.
    """
    report = PlanReport(samples=metadata.num_rows)
    length = _numpy(metadata["prompt_length"]) + _numpy(metadata["response_length"])
    keep = _choose(metadata, spec, report, length)
    rows_N = np.flatnonzero(keep)
    bits = np.random.Philox(key=[spec.seed, spec.epoch])
    # Sorting by the generator's raw bits, rather than Generator.permutation: numpy keeps only the former stable.
    rows_N = rows_N[np.argsort(bits.random_raw(len(rows_N)), kind="stable")]
    lengths_N = length[rows_N].astype(np.int64)
    report.planned, report.tokens = len(rows_N), int(lengths_N.sum())

    names, key_N = _teacher_keys(metadata["teachers"], rows_N)
    if spec.whole_groups:
        per_step = spec.ranks * spec.bins_per_rank
        bin_N = pack_groups(lengths_N, _groups(metadata["group"], rows_N), per_step, spec.token_budget)
        bins = -(-(int(bin_N.max(initial=-1)) + 1) // per_step) * per_step
    else:
        bin_N = _pack(lengths_N, key_N if spec.by_teacher else np.zeros_like(key_N), spec)
        bins = int(bin_N.max(initial=-1)) + 1
    report.own_batch = int(np.count_nonzero(lengths_N > spec.token_budget))
    placed = arrange(
        lengths_N,
        bin_N,
        key_N,
        bits.random_raw(bins),
        capacity=spec.token_budget,
        ranks=spec.ranks,
        bins_per_rank=spec.bins_per_rank,
        may_spread=spec.packing == "best_fit",
        whole_steps=spec.whole_groups,
    )
    report.steps = placed.steps
    table, oversize_steps = _table(metadata, rows_N, lengths_N, key_N, names, placed.bin_N, spec)
    fits = lengths_N <= spec.token_budget
    used = len(np.unique(placed.bin_N[fits])) if report.own_batch else len(np.unique(placed.bin_N))
    if used:
        report.packing_fill = float(lengths_N[fits].sum() / (used * spec.token_budget))
    even = np.delete(placed.imbalance_S, oversize_steps)
    report.rank_imbalance = float(even.max(initial=1.0))
    return Plan(table, {**identity, "spec": spec.describe()}, report)


def _choose(metadata: Any, spec: PlanSpec, report: PlanReport, length: NDArray[np.int32]) -> NDArray[np.bool_]:
    """bool [rows]: which rows are planned; fills in the report's counts of the others."""
    keep = np.ones(metadata.num_rows, dtype=np.bool_)
    if spec.filter is not None:
        row = pa.array(np.arange(metadata.num_rows))
        try:
            chosen = metadata.append_column("__row", row).filter(spec.filter)["__row"]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DatasetError(
                problem(
                    f"the filter cannot be applied to the columns {metadata.column_names}: {error}",
                    consequence="Nothing was planned",
                    remedy="Name the columns that the filter reads in `filter_columns`",
                )
            ) from error
        keep[:] = False
        keep[_numpy(chosen)] = True
        report.filtered = int(np.count_nonzero(~keep))
    if not spec.censored:
        censored = keep & metadata["censored"].is_valid().to_numpy()
        report.censored = int(np.count_nonzero(censored))
        keep &= ~censored
    if spec.freshness is not None:
        fresh = spec.freshness.keep(metadata)
        response = _numpy(metadata["response_length"])
        report.stale = int(np.count_nonzero(keep & ~fresh))
        report.stale_by_length = removed_by_length(response[keep], fresh[keep])
        keep &= fresh
    long = keep & (length > spec.token_budget)
    if spec.too_long == "error" and long.any():
        row_number = int(np.argmax(long))
        raise DatasetError(
            problem(
                f"sample {metadata['sample'][row_number].as_py()!r} has {length[row_number]} tokens, and "
                f"{int(long.sum()) - 1} more are longer than the budget of {spec.token_budget}",
                consequence="Nothing was planned",
                remedy="Raise token_budget, or pass too_long='skip' or 'own_batch'",
            )
        )
    if spec.too_long == "skip":
        report.skipped_too_long = int(np.count_nonzero(long))
        keep &= ~long
    return keep


def _teacher_keys(teachers: Any, rows_N: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int32]]:
    """The sets of teachers that occur, each written "a+b", sorted; and which of them each planned row has."""
    names: dict[str, int] = {}
    parts = [np.zeros(0, dtype=np.int32)]
    for chunk in teachers.chunks:
        counts = chunk.value_lengths().to_numpy()
        codes = np.full(len(chunk), names.setdefault("", len(names)), dtype=np.int32)
        flat = chunk.flatten().dictionary_encode()
        flat_codes = flat.indices.to_numpy()
        words = flat.dictionary.to_pylist()
        first = np.cumsum(counts) - counts
        single = counts == 1
        of_word = np.array([names.setdefault(w, len(names)) for w in words], dtype=np.int32)
        if len(words):
            codes[single] = of_word[flat_codes[first[single]]]
        for width in np.unique(counts[counts > 1]).tolist():
            rows = np.flatnonzero(counts == width)
            combos, which = np.unique(flat_codes[first[rows][:, None] + np.arange(width)], axis=0, return_inverse=True)
            written = ["+".join(sorted({words[c] for c in combo})) for combo in combos.tolist()]
            of_combo = np.array([names.setdefault(w, len(names)) for w in written], dtype=np.int32)
            codes[rows] = of_combo[which.ravel()]
        parts.append(codes)
    ordered = sorted(names)
    renumber = np.zeros(max(len(names), 1), dtype=np.int32)
    renumber[[names[n] for n in ordered]] = np.arange(len(ordered))
    return ordered, renumber[np.concatenate(parts)[rows_N]]


def _groups(group: Any, rows_N: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [N]: the number of each planned row's group; one without a name is a group of its own."""
    codes = group.combine_chunks().dictionary_encode()
    names, code_N = codes.dictionary.to_pylist(), np.asarray(codes.indices.to_numpy(), dtype=np.int32)[rows_N]
    if "" in names:
        alone = np.flatnonzero(code_N == names.index(""))
        code_N[alone] = len(names) + np.arange(len(alone), dtype=np.int32)
    return code_N


def _pack(lengths_N: NDArray[np.int64], class_N: NDArray[np.int32], spec: PlanSpec) -> NDArray[np.int32]:
    """int32 [N]: the bin of each sample; only samples of one class share a bin, and oversize ones share none."""
    if spec.packing == "none":
        return np.arange(len(lengths_N), dtype=np.int32)
    out = np.empty(len(lengths_N), dtype=np.int32)
    bins = 0
    fits = lengths_N <= spec.token_budget
    for which in np.unique(class_N).tolist():
        members = np.flatnonzero(fits & (class_N == which))
        packed = best_fit_decreasing(lengths_N[members], spec.token_budget)
        out[members] = bins + packed
        bins += int(packed.max(initial=-1)) + 1
    long = np.flatnonzero(~fits)
    out[long] = np.arange(bins, bins + len(long), dtype=np.int32)
    return out


def _table(
    metadata: Any,
    rows_N: NDArray[np.int64],
    lengths_N: NDArray[np.int64],
    key_N: NDArray[np.int32],
    names: list[str],
    bin_N: NDArray[np.int32],
    spec: PlanSpec,
) -> tuple[Any, NDArray[np.int64]]:
    """The plan's table, ordered by step, rank and place; and the steps that hold samples longer than the budget."""
    by_key = np.argsort(key_N, kind="stable")
    order = by_key[np.argsort(bin_N[by_key], kind="stable")]
    bin_N, lengths_N, rows_N = bin_N[order], lengths_N[order], rows_N[order]
    per_step = spec.ranks * spec.bins_per_rank
    step = bin_N // per_step
    ends = np.cumsum(lengths_N)
    starts = ends - lengths_N
    new_bin = np.empty(len(bin_N), dtype=np.bool_)
    new_bin[:1] = True
    new_bin[1:] = bin_N[1:] != bin_N[:-1]
    bin_start = np.repeat(starts[new_bin], np.diff(np.append(np.flatnonzero(new_bin), len(bin_N))))
    teachers = pa.DictionaryArray.from_arrays(pa.array(key_N[order]), pa.array(names, pa.string()))
    columns = {
        "step": step.astype(np.int32),
        "rank": (bin_N % per_step // spec.bins_per_rank).astype(np.int32),
        "bin": (bin_N % spec.bins_per_rank).astype(np.int32),
        "start": (starts - bin_start).astype(np.int32),
        "length": lengths_N.astype(np.int32),
        "row": rows_N,
        "teachers": teachers,
    }
    table = pa.table([columns[f.name] for f in PLAN_SCHEMA], schema=PLAN_SCHEMA)
    return table, np.unique(step[lengths_N > spec.token_budget])


def _numpy(column: Any) -> NDArray[Any]:
    return np.asarray(column.to_numpy())
