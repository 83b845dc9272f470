"""What a server needs of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rollout_wal.dataset import Provenance, tokens_crc32c

from ..errors import BadRequest, problem
from ..items import Int32s, ScoreItem, Scores


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What is known of a teacher without loading it.

    Args:
        provenance: what its scores carry.
        vocabulary: token ids 0 to vocabulary − 1 exist; logits beyond are padding, and are masked.
        max_context: tokens that it reads.
        hidden_size: of its last layer.
        nbytes: memory that it takes, roughly.
        domains: labels that are routed to it.
    """

    provenance: Provenance
    vocabulary: int
    max_context: int
    hidden_size: int
    nbytes: int
    domains: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.provenance.source

    def check(self, item: ScoreItem) -> None:
        """Raises BadRequest if the item is not within what this teacher knows."""
        read = item.read_ids()
        wrong = None
        if len(read) > self.max_context:
            wrong = f"it has {len(read)} tokens and the teacher's context holds {self.max_context}"
        elif int(read.max()) >= self.vocabulary:
            wrong = f"it holds token id {int(read.max())} and the teacher's vocabulary has {self.vocabulary}"
        elif item.wanted.top_k > self.vocabulary:
            wrong = f"it wants the top {item.wanted.top_k} of a vocabulary of {self.vocabulary}"
        elif item.candidates is not None and self._unknown(ids := item.candidates.values):
            wrong = f"its candidates go from {ids.min()} to {ids.max()}; the vocabulary has {self.vocabulary}"
        if wrong:
            raise BadRequest(
                problem(
                    f"teacher {self.id!r} cannot score the item: {wrong}",
                    consequence="Nothing was computed for it",
                    remedy="Shorten it, or choose a teacher that shares the student's tokenizer",
                )
            )

    def scores_of(self, item: ScoreItem, valid_P: NDArray[np.bool_], **arrays: Any) -> Scores:
        """What was computed for an item, with all that says whose it is and of which tokens (I6)."""
        return Scores(
            span=item.span,
            provenance=self.provenance,
            tokens_crc32c=tokens_crc32c(item.token_ids),
            scored_crc32c=tokens_crc32c(item.read_ids()),
            request_key=item.key(self.provenance),
            valid=valid_P,
            **arrays,
        )

    def _unknown(self, ids: Int32s) -> bool:
        return bool(((ids < 0) | (ids >= self.vocabulary)).any())


class Teacher(Protocol):
    """A teacher in memory. Used by one thread at a time."""

    info: TeacherInfo

    def stream(
        self, items: Sequence[ScoreItem], wanted: Callable[[int], bool] = ...
    ) -> Iterator[tuple[int, Scores | Exception]]:
        """(index, scores or why there are none) of items that `info.check` accepts, as they are computed.

        An item that fails does not fail its company. `wanted(index)` is asked just before an item is computed; one
        that is not wanted any more is left out.
        """
        ...

    def head(self) -> Any:
        """The LM head as a tensor [vocabulary, hidden size], float32 or bfloat16.

        Raises:
            BadRequest: logits are not a linear map of hidden states, so that a head would rebuild others.
        """
        ...

    def close(self) -> None:
        """Let go of its memory. It is not used afterwards, and nothing is computed now."""
        ...


class InOrder:
    """For a teacher: all of `stream` at once."""

    def score(self: Teacher, items: Sequence[ScoreItem]) -> list[Scores]:
        """Scores of all items, in their order. Raises the first error that `stream` gives."""
        out: list[Scores | None] = [None] * len(items)
        for i, outcome in self.stream(items):
            if isinstance(outcome, Exception):
                raise outcome
            out[i] = outcome
        return [scores for scores in out if scores is not None]


class TeacherSource(Protocol):
    """A teacher that can be loaded any number of times, always the same."""

    info: TeacherInfo

    def load(self) -> Teacher:
        """Raises TeacherFailed: it cannot be loaded, or is not what `info` says it is."""
        ...
