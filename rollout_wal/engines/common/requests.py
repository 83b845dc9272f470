"""The state of running requests as columns, one row each: what the engine touches at every step.

Shape legend: M = rows of the table (the most requests that run at once), N = rows picked, T = tokens, S = stop tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...params import SamplingParams
from ...sampling import Penalties, SamplingRows
from ..base import FinishReason, Request

_NO_TOKEN = -1


class RequestTable:
    """Columns over the running requests. Rows are reused; `active_M` says which are in use."""

    def __init__(self, rows: int, eos_token_ids: tuple[int, ...], max_context: int) -> None:
        self.eos = np.array(eos_token_ids, dtype=np.int64)
        self.max_context = max_context
        self.active_M = np.zeros(rows, dtype=np.bool_)
        self.slot_M = np.zeros(rows, dtype=np.int64)
        self.arrival_M = np.zeros(rows, dtype=np.int64)
        self.length_M = np.zeros(rows, dtype=np.int64)
        """Prompt + prefix + output tokens so far."""
        self.computed_M = np.zeros(rows, dtype=np.int64)
        """Leading tokens whose KV is in the cache."""
        self.sampled_M = np.zeros(rows, dtype=np.int64)
        self.tokens_MT = np.zeros((rows, 256), dtype=np.int64)
        self._is_sampled_MT = np.zeros((rows, 256), dtype=np.bool_)
        self._noise_key_M = np.zeros(rows, dtype=np.uint64)
        self._temperature_M = np.ones(rows)
        self._top_k_M = np.zeros(rows, dtype=np.int64)
        self._top_p_M = np.ones(rows)
        self._min_p_M = np.zeros(rows)
        self._min_tokens_M = np.zeros(rows, dtype=np.int64)
        self._max_tokens_M = np.zeros(rows, dtype=np.int64)
        self._ignore_eos_M = np.zeros(rows, dtype=np.bool_)
        self._stop_MS = np.full((rows, 1), _NO_TOKEN, dtype=np.int64)
        self._penalised_M = np.zeros(rows, dtype=np.bool_)
        self._sampling: dict[int, SamplingParams] = {}
        self._row_of_slot: dict[int, int] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._row_of_slot)

    def row(self, slot: int) -> int | None:
        """The row of a running slot."""
        return self._row_of_slot.get(slot)

    def rows(self) -> NDArray[np.int64]:
        """The rows in use, in order of arrival."""
        active = np.flatnonzero(self.active_M)
        return active[np.argsort(self.arrival_M[active])]

    def add(self, request: Request) -> int:
        """Fill a free row (there must be one) and return it."""
        row = int(np.argmin(self.active_M))
        sampling, prompt, length = request.sampling, len(request.prompt), len(request.prompt) + len(request.prefix)
        self._widen(length + 1)
        self.active_M[row] = True
        self.slot_M[row] = request.slot
        self.arrival_M[row] = self._arrivals
        self._arrivals += 1
        self.length_M[row], self.computed_M[row] = length, 0
        self.sampled_M[row] = np.count_nonzero(request.prefix_sampled)
        self.tokens_MT[row, :prompt] = request.prompt
        self.tokens_MT[row, prompt:length] = request.prefix
        self._is_sampled_MT[row, :prompt] = False
        self._is_sampled_MT[row, prompt:length] = request.prefix_sampled
        self._noise_key_M[row] = request.noise_key
        self._temperature_M[row] = sampling.temperature
        self._top_k_M[row] = sampling.top_k
        self._top_p_M[row] = sampling.top_p
        self._min_p_M[row] = sampling.min_p
        self._min_tokens_M[row], self._max_tokens_M[row] = sampling.min_tokens, sampling.max_tokens
        self._ignore_eos_M[row] = sampling.ignore_eos
        stops = len(sampling.stop_token_ids)
        if stops > self._stop_MS.shape[1]:
            extra = stops - self._stop_MS.shape[1]
            self._stop_MS = np.pad(self._stop_MS, ((0, 0), (0, extra)), constant_values=_NO_TOKEN)
        self._stop_MS[row] = _NO_TOKEN
        self._stop_MS[row, :stops] = sampling.stop_token_ids
        self._penalised_M[row] = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        self._sampling[row] = sampling
        self._row_of_slot[request.slot] = row
        return row

    def remove(self, row: int) -> None:
        self.active_M[row] = False
        del self._row_of_slot[int(self.slot_M[row])]
        del self._sampling[row]

    def append(self, row_N: NDArray[np.int64], token_N: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Append a sampled token to each row; returns each row's FinishReason.

        The same predicate as `rollout_wal.finish.finish_reason`, over columns.
        """
        length_N = self.length_M[row_N]
        self._widen(int(length_N.max()) + 1)
        self.tokens_MT[row_N, length_N] = token_N
        self._is_sampled_MT[row_N, length_N] = True
        self.length_M[row_N] += 1
        self.sampled_M[row_N] += 1
        sampled_N = self.sampled_M[row_N]
        may_end_N = sampled_N >= self._min_tokens_M[row_N]
        finish_N = np.zeros(len(row_N), dtype=np.uint8)
        # From the weakest reason to the strongest: the later assignment wins.
        finish_N[self.length_M[row_N] >= self.max_context] = FinishReason.CONTEXT
        finish_N[sampled_N >= self._max_tokens_M[row_N]] = FinishReason.MAX_TOKENS
        finish_N[may_end_N & (self._stop_MS[row_N] == token_N[:, None]).any(axis=1)] = FinishReason.STOP_TOKEN
        ends_N = np.isin(token_N, self.eos)
        finish_N[may_end_N & ends_N & ~self._ignore_eos_M[row_N]] = FinishReason.EOS
        return finish_N

    def push(self, row: int, token: int) -> None:
        """Append a token that the policy sampled, for an engine that decides by itself when a request ends."""
        length = int(self.length_M[row])
        self._widen(length + 1)
        self.tokens_MT[row, length] = token
        self._is_sampled_MT[row, length] = True
        self.length_M[row] += 1
        self.sampled_M[row] += 1

    def truncate(self, row: int, length: int) -> None:
        """Take back the last sampled tokens, down to `length` tokens."""
        self.sampled_M[row] -= np.count_nonzero(self._is_sampled_MT[row, length : int(self.length_M[row])])
        self.length_M[row] = length

    def sampling_rows(self, row_N: NDArray[np.int64]) -> SamplingRows:
        """How to draw the next token of each of these rows."""
        return SamplingRows(
            slot_N=self.slot_M[row_N],
            noise_key_N=self._noise_key_M[row_N],
            position_N=self.length_M[row_N],
            temperature_N=self._temperature_M[row_N],
            top_k_N=self._top_k_M[row_N],
            top_p_N=self._top_p_M[row_N],
            min_p_N=self._min_p_M[row_N],
            forbidden_E=self._forbidden(row_N),
            penalties=self._penalties(row_N),
        )

    def _forbidden(self, row_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """What would end a rollout that has not reached its min_tokens."""
        early = np.flatnonzero(self.sampled_M[row_N] < self._min_tokens_M[row_N])
        if not len(early):
            return None
        at, tokens = [], []
        for i in early:
            row = row_N[i]
            ends = self._stop_MS[row]
            ends = ends[ends != _NO_TOKEN]
            if not self._ignore_eos_M[row]:
                ends = np.concatenate((ends, self.eos))
            at.append(np.full(len(ends), i))
            tokens.append(ends)
        return np.concatenate(at), np.concatenate(tokens)

    def _penalties(self, row_N: NDArray[np.int64]) -> Penalties | None:
        columns: list[tuple[NDArray[np.int64], ...]] = []
        factors: list[NDArray[np.float64]] = []
        for i in np.flatnonzero(self._penalised_M[row_N]):
            row = int(row_N[i])
            length, sampling = int(self.length_M[row]), self._sampling[row]
            token_E, inverse = np.unique(self.tokens_MT[row, :length], return_inverse=True)
            count_E = np.bincount(inverse[self._is_sampled_MT[row, :length]], minlength=len(token_E))
            columns.append((np.full(len(token_E), i), token_E, count_E))
            strength = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
            factors.append(np.tile(np.array(strength, dtype=np.float64)[:, None], len(token_E)))
        if not columns:
            return None
        row_E, token_E, count_E = (np.concatenate(part) for part in zip(*columns, strict=True))
        return Penalties(row_E, token_E, count_E, *np.concatenate(factors, axis=1))

    def _widen(self, tokens: int) -> None:
        width = self.tokens_MT.shape[1]
        if tokens > width:
            extra = ((0, 0), (0, max(tokens, 2 * width) - width))
            self.tokens_MT = np.pad(self.tokens_MT, extra)
            self._is_sampled_MT = np.pad(self._is_sampled_MT, extra)
