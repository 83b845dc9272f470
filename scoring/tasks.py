"""From a sample and its routes to items, and from scores back to columns of the dataset.

A teacher's scores of a sample are the column group "teacher.<id>", with one entry per token of the sample, masked
where there is none:

    logprobs                  float32 [T]
    topk_ids, topk_logprobs   int32, float32 [T, k], most likely first
    tail_mass                 float32 [T], probability of all other tokens
    entropy                   float32 [T], nats
    weight                    float32 [T], how much the teacher's opinion counts on this token

Last-layer hidden states, which are far larger and read by other losses, are a group of their own, "hidden.<id>", with
the column hidden_states (bfloat16 [T, H]). Entry t is about token t, given all before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_wal.dataset import ColumnGroup, Masked, Provenance, tokens_crc32c

from .items import ScoreItem, Scores, Wanted
from .routing import Route


def teacher_group(teacher: str, prefix: str = "") -> str:
    """The column group of a teacher's scores."""
    return f"{prefix}teacher.{teacher}"


def hidden_group(teacher: str, prefix: str = "") -> str:
    """The column group of a teacher's hidden states."""
    return f"{prefix}hidden.{teacher}"


def groups_of(teacher: str, wanted: Wanted, prefix: str = "") -> list[str]:
    """The column groups that scoring a sample under a teacher fills."""
    numbers = wanted.logprobs or wanted.top_k or wanted.entropy
    return [teacher_group(teacher, prefix)] * bool(numbers) + [hidden_group(teacher, prefix)] * wanted.hidden_states


def columns_of(wanted: Wanted) -> set[str]:
    """The names of the columns of "teacher.<id>"."""
    names = {"weight"} | ({"logprobs"} if wanted.logprobs else set()) | ({"entropy"} if wanted.entropy else set())
    return names | ({"topk_ids", "topk_logprobs", "tail_mass"} if wanted.top_k else set())


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One sample under one teacher.

    Args:
        key: the sample's.
        token_ids: int32 [T].
        weights: float32 [T]; 0 on tokens that this teacher does not score.
    """

    key: str
    teacher: str
    token_ids: NDArray[np.int32]
    weights: NDArray[np.float32]

    @property
    def span(self) -> tuple[int, int]:
        """From the first token that is scored to the last; those between that are not come for free."""
        at = np.flatnonzero(self.weights)
        return int(at[0]), int(at[-1]) + 1

    def item(
        self,
        wanted: Wanted,
        *,
        temperature: float = 1.0,
        expected: Provenance | None = None,
        teacher_prefix_ids: NDArray[np.int32] | None = None,
    ) -> ScoreItem:
        """What to send. Arguments as of `ScoreItem`."""
        return ScoreItem(
            self.token_ids,
            self.span,
            self.teacher,
            temperature=temperature,
            wanted=wanted,
            expected=expected,
            teacher_prefix_ids=teacher_prefix_ids,
        )

    def columns(self, scores: Scores, wanted: Wanted, prefix: str = "") -> dict[str, ColumnGroup]:
        """Column groups by name, from scores that were held against this task's item."""
        start, end = scores.span
        valid = np.zeros(len(self.token_ids), np.bool_)
        valid[start:end] = scores.valid
        valid &= self.weights > 0

        def whole(values: NDArray[Any] | None) -> Masked:
            assert values is not None
            out = np.zeros((len(valid), *values.shape[1:]), values.dtype)
            out[start:end] = values
            return Masked(out, valid)

        checksum = tokens_crc32c(self.token_ids)
        groups: dict[str, ColumnGroup] = {}
        columns: dict[str, Masked] = {}
        if wanted.logprobs:
            columns["logprobs"] = whole(scores.logprobs)
        if wanted.top_k:
            columns["topk_ids"] = whole(scores.top_ids)
            columns["topk_logprobs"] = whole(scores.top_logprobs)
            columns["tail_mass"] = whole(scores.tail_mass)
        if wanted.entropy:
            columns["entropy"] = whole(scores.entropy)
        if columns:
            columns["weight"] = Masked(self.weights, valid)
            groups[teacher_group(self.teacher, prefix)] = ColumnGroup(columns, scores.provenance, checksum)
        if wanted.hidden_states:
            groups[hidden_group(self.teacher, prefix)] = ColumnGroup(
                {"hidden_states": whole(scores.hidden_states)},
                scores.provenance,
                checksum,
                bfloat16=frozenset({"hidden_states"}),
            )
        return groups


def tasks_of(
    key: str, token_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], routes: Sequence[Route]
) -> list[Task]:
    """One task for each teacher that has a sampled token to score.

    Args:
        loss_mask: bool [T]; tokens that the policy did not sample are never scored.
    """
    weights: dict[str, NDArray[np.float32]] = {}
    for route in routes:
        here = weights.setdefault(route.teacher, np.zeros(len(token_ids), np.float32))
        here[route.covers(len(token_ids)) & loss_mask] = route.weight
    return [Task(key, teacher, token_ids, w) for teacher, w in weights.items() if w.any()]


def nbytes(groups: Mapping[str, ColumnGroup]) -> int:
    """Bytes that columns take in memory."""
    columns = [column for group in groups.values() for column in group.columns.values()]
    return sum(c.values.nbytes + c.valid.nbytes if isinstance(c, Masked) else c.nbytes for c in columns)
