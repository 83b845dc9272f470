"""Which items are forwarded together.

Items with the same context (the tokens before the span) share its computation. All others are sorted by length, so
that little of a batch is padding. Right padding needs no mask in a causal model: nothing before it sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .items import Int32s, ScoreItem

#: A shared context shorter than this is not worth a forward of its own.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows to forward together, after a prefix that they share.

    Args:
        prefix: tokens that all rows begin with, forwarded once; may be empty.
        members: positions in the list of items.
        rows: what each of them reads after the prefix, its last token left out: nothing is predicted from it.
        same_prefix_follows: the next batch has the same prefix.
    """

    prefix: Int32s
    members: tuple[int, ...]
    rows: tuple[Int32s, ...]
    same_prefix_follows: bool = False

    @property
    def tokens(self) -> int:
        """Tokens forwarded after the prefix, padding included."""
        return len(self.rows) * max(len(row) for row in self.rows)

    def only(self, members: Collection[int]) -> Batch | None:
        """The same with fewer members; None if none is left."""
        kept = [(i, row) for i, row in zip(self.members, self.rows) if i in members]
        if not kept:
            return None
        ids, rows = zip(*kept)
        return Batch(self.prefix, ids, rows, self.same_prefix_follows)


def context_key(item: ScoreItem) -> bytes:
    """Equal for items that read the same tokens before their spans."""
    read = item.read_ids()
    return hashlib.blake2b(read[: len(read) - item.positions].tobytes(), digest_size=16).digest()


def plan(items: Sequence[ScoreItem], token_budget: int, *, share_prefixes: bool = True) -> list[Batch]:
    """Batches of at most `token_budget` tokens each, padding included; a longer item is a batch by itself."""
    reads = [item.read_ids() for item in items]
    by_context: dict[bytes, list[int]] = {}
    for i, (item, read) in enumerate(zip(items, reads)):
        by_context.setdefault(read[: len(read) - item.positions].tobytes(), []).append(i)
    batches: list[Batch] = []
    alone: list[int] = []
    for members in by_context.values():
        # The context's last token stays with the rows: what it predicts is the first score of each.
        shared = len(reads[members[0]]) - items[members[0]].positions - 1
        if len(members) < 2 or shared < MIN_SHARED_TOKENS or not share_prefixes:
            alone += members
            continue
        prefix = reads[members[0]][:shared]
        parts = list(_cut(members, {i: reads[i][shared:-1] for i in members}, token_budget))
        for n, (ids, rows) in enumerate(parts):
            batches.append(Batch(prefix, ids, rows, same_prefix_follows=n + 1 < len(parts)))
    empty = np.zeros(0, np.int32)
    batches += [Batch(empty, *part) for part in _cut(alone, {i: reads[i][:-1] for i in alone}, token_budget)]
    return batches


def _cut(
    members: Sequence[int], rows: dict[int, Int32s], budget: int
) -> Iterator[tuple[tuple[int, ...], tuple[Int32s, ...]]]:
    """Longest first, so that the largest batch comes first and memory is not found short at the end."""
    current: list[int] = []
    for i in sorted(members, key=lambda i: -len(rows[i])):
        if current and (len(current) + 1) * len(rows[current[0]]) > budget:
            yield tuple(current), tuple(rows[j] for j in current)
            current = []
        current.append(i)
    if current:
        yield tuple(current), tuple(rows[j] for j in current)
