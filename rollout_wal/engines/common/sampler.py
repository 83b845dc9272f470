"""The project's sampler for engines that bring their own batches: noise by position, whoever computes the logits.

Shape legend: N = rows that are drawn, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...sampling import Draw, draw
from ..base import Request
from .requests import RequestTable

#: Marks an output token that the engine has not brought to the host yet.
_UNKNOWN = -1


class RowSampler:
    """The requests that an engine runs, and how each is drawn: penalties and limits see prefix and output as one.

    Args:
        rows: requests that run at once at most.
        eos_token_ids, max_context: of the model.
    """

    def __init__(self, rows: int, eos_token_ids: tuple[int, ...], max_context: int) -> None:
        self._table = RequestTable(rows, eos_token_ids, max_context)
        self._base = np.zeros(rows, np.int64)
        self._drawn_at = np.full(rows, -1, np.int64)
        self._drawn = np.zeros(rows, np.int64)
        self._next = 0
        self._slots: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._table)

    def add(self, request: Request) -> int:
        """Returns its row. `request.slot` names it in errors alone, so need not be unique."""
        row = self._table.add(
            Request(
                self._unique(),
                request.prompt,
                request.prefix,
                request.prefix_sampled,
                request.sampling,
                request.noise_key,
            )
        )
        self._base[row] = len(request.prompt) + len(request.prefix)
        self._drawn_at[row] = -1
        return row

    def remove(self, row: int) -> None:
        """The request has left the batch; its row is free."""
        self._table.remove(row)

    def follow(self, row: int, output: Sequence[int]) -> None:
        """Take in what the engine has sampled for a row since `add`: all of it, of which the new is read.

        A token that the engine marks as unknown (-1: it was drawn, but is on its device still) is the one drawn here.
        An output that is shorter than before (the engine took tokens back) is followed too.
        """
        table, base = self._table, int(self._base[row])
        known = int(table.length_M[row]) - base
        if len(output) < known:
            table.truncate(row, base + len(output))
            return
        for at in range(known, len(output)):
            token = output[at]
            if token == _UNKNOWN and self._drawn_at[row] == base + at:
                token = int(self._drawn[row])
            table.push(row, token)

    def reach(self, row: int, length: int) -> bool:
        """Bring a row to `length` tokens with the one that was drawn here last, or by taking tokens back.

        For an engine whose tokens are not at hand. False: more than that one is missing, and nothing was done.
        """
        table, known = self._table, int(self._table.length_M[row])
        if length == known + 1 and self._drawn_at[row] == known:
            table.push(row, int(self._drawn[row]))
        elif length < known:
            table.truncate(row, length)
        return length <= known or int(table.length_M[row]) == length

    def lengths(self, row_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each row: the position of its next one."""
        return self._table.length_M[row_N]

    def ends_with(self, row: int, tokens: Sequence[int], *, after: int) -> bool:
        """Whether a row ends so, with nothing of it among its first `after` tokens."""
        length = int(self._table.length_M[row])
        begin = length - len(tokens)
        return begin >= after and self._table.tokens_MT[row, begin:length].tolist() == list(tokens)

    def draw(self, logits_NV: Tensor, row_N: NDArray[np.int64]) -> Draw:
        """Draw the next token of each row. Does not advance the rows: `follow` does, when the engine has kept them.

        Raises:
            BackendError: unusable logits.
        """
        drawn = draw(logits_NV, self._table.sampling_rows(row_N))
        self._drawn_at[row_N] = self._table.length_M[row_N]
        self._drawn[row_N] = drawn.token_N
        return drawn

    def _unique(self) -> int:
        self._next += 1
        return self._next
