"""For tests of what lies around a teacher, with none of a model's cost: a teacher that is plain arithmetic.

Its score of a token is a function of that token and the one before. It can be held up, made to fail, or answer wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rollout_wal.dataset import Provenance

from .items import ScoreItem, Scores
from .teachers.base import TeacherInfo


def expected_logprobs(item: ScoreItem) -> Any:
    """float32 [P], what the teacher answers."""
    read = item.read_ids().astype(np.float64)
    before, at = read[:-1], read[1:]
    return (-(1.0 + (31 * before + 17 * at) % 97) / 10).astype(np.float32)[len(read) - 1 - item.positions :]


class PlainSource:
    """See the module. `gate` cleared: computing waits for it.

    Args:
        fail: what loading raises.
        answer: instead of the right scores.
    """

    def __init__(
        self,
        name: str,
        *,
        nbytes: int = 1,
        fail: Exception | None = None,
        answer: Callable[[ScoreItem, Scores], Any] | None = None,
        domains: tuple[str, ...] = (),
    ) -> None:
        self.info = TeacherInfo(Provenance(name, "c0", "", "", "exact"), 1000, 100_000, 8, nbytes, domains)
        self.fail, self.answer = fail, answer
        self.gate = threading.Event()
        self.gate.set()
        self.loads = 0
        self.batches: list[int] = []
        self.scored: list[ScoreItem] = []
        self.alive = 0
        self.closed = 0

    def load(self) -> PlainTeacher:
        self.loads += 1
        if self.fail is not None:
            raise self.fail
        return PlainTeacher(self)


class PlainTeacher:
    """In memory."""

    def __init__(self, source: PlainSource) -> None:
        self.info, self._source = source.info, source
        source.alive += 1

    def __del__(self) -> None:
        self._source.alive -= 1

    def stream(
        self, items: Sequence[ScoreItem], wanted: Callable[[int], bool] = lambda _: True
    ) -> Iterator[tuple[int, Scores | Exception]]:
        self._source.batches.append(len(items))
        for i, item in enumerate(items):
            assert self._source.gate.wait(30)
            if not wanted(i):
                continue
            self._source.scored.append(item)
            valid = np.ones(item.positions, bool)
            scores = self.info.scores_of(item, valid, logprobs=expected_logprobs(item))
            yield i, self._source.answer(item, scores) if self._source.answer else scores

    def head(self) -> Any:
        import torch

        return torch.arange(80, dtype=torch.float32).reshape(10, 8)

    def close(self) -> None:
        self._source.closed += 1


def plain_item(seed: int, teacher: str = "a", length: int = 12, **fields: Any) -> ScoreItem:
    """An item of random tokens whose first four are context."""
    return ScoreItem(
        np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32), (4, length), teacher, **fields
    )
