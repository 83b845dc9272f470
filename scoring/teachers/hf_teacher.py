"""A transformers model in memory, as a teacher.

Shape legend: N = rows of a batch, L = tokens of its longest row, R = scored positions of a row, H = hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rollout_wal.errors import RolloutWalError

from ..batching import Batch, plan
from ..errors import BadRequest, TeacherFailed, problem
from ..items import Int32s, ScoreItem, Scores
from .base import InOrder, TeacherInfo
from .hidden_scores import ScoreHead
from .shared_prefix import CannotShare, RowCache, SharedPrefix

log = logging.getLogger(__name__)

#: Away from the CPU, a context is copied for each row while the copies take no more than this.
COPIED_BYTES = 1 << 30


class _Context:
    """What several items have before their spans, forwarded once."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self._shared: SharedPrefix | None = None

    @property
    def nbytes(self) -> int:
        tensors = (x for layer in self.cache.layers for x in (layer.keys, layer.values) if x is not None)
        return sum(x.nbytes for x in tensors)

    def rows(self, width: int) -> RowCache:
        """See SharedPrefix."""
        if self._shared is None:
            self._shared = SharedPrefix(self.cache)
        return self._shared.rows(width)


class HfTeacher(InOrder):
    """A model in memory.

    Args:
        owned: nobody else uses the model: `close` empties it.
    """

    def __init__(
        self,
        model: Any,
        info: TeacherInfo,
        token_budget: int,
        chunk_tokens: int,
        *,
        share_prefixes: bool = True,
        owned: bool = True,
    ) -> None:
        self.info, self._share, self._owned = info, share_prefixes, owned
        self._model = model.eval()
        self._decoder = model.get_decoder()
        self._head: Tensor = model.get_output_embeddings().weight
        self._device = self._head.device
        self._budget, self._chunk = token_budget, chunk_tokens
        self._scorer = ScoreHead(info, self._head, self._probe())
        self._continues = share_prefixes and self._probe_sharing()
        """Whether rows go on after a context that none of them has a copy of."""

    def stream(
        self, items: Sequence[ScoreItem], wanted: Callable[[int], bool] = lambda _: True
    ) -> Iterator[tuple[int, Scores | Exception]]:
        """See `Teacher`. One item's number may differ from what it would be in other company by rounding alone."""
        context: _Context | None = None
        with torch.inference_mode():
            batches = plan(items, self._budget, share_prefixes=self._share)
        for batch in batches:
            members = [i for i in batch.members if wanted(i)]
            part = batch if len(members) == len(batch.members) else batch.only(members)
            with torch.inference_mode():  # never across a yield: it belongs to the thread
                if part is None:
                    results: list[tuple[int, Scores | Exception]] = []
                else:
                    try:
                        if len(part.prefix) and context is None:
                            context = _Context(self._cache_of(part.prefix))
                        results = list(zip(part.members, self._batch(part, context, items)))
                    except Exception as error:  # whatever a model raises; its company may be fine
                        context = None
                        results = self._one_by_one(part, items, error)
                if not batch.same_prefix_follows:
                    context = None
            yield from results

    def _batch(self, batch: Batch, context: _Context | None, items: Sequence[ScoreItem]) -> list[Scores | Exception]:
        out: list[Scores | Exception] = []
        for i, hidden_RH in zip(batch.members, self._hidden(batch, context, items)):
            try:
                out.append(self._scorer.scores(items[i], hidden_RH))
            except RolloutWalError as error:
                out.append(error)
        return out

    def _one_by_one(
        self, batch: Batch, items: Sequence[ScoreItem], error: Exception
    ) -> list[tuple[int, Scores | Exception]]:
        """What failed together, each by itself: less memory, and no company that could be to blame."""
        if len(batch.members) == 1 and not len(batch.prefix):
            return [(batch.members[0], error)]
        out: list[tuple[int, Scores | Exception]] = []
        for i in batch.members:
            alone = Batch(batch.prefix[:0], (i,), (items[i].read_ids()[:-1],))
            try:
                out.append((i, self._batch(alone, None, items)[0]))
            except Exception as again:
                out.append((i, again))
        return out

    def head(self) -> Tensor:
        if self._scorer.cap is not None:
            raise BadRequest(
                problem(
                    f"the logits of teacher {self.info.id!r} are capped after its head",
                    consequence="Hidden states and the head alone would rebuild other logits, so it is not given out",
                    remedy="Ask for top-k or candidate log-probabilities instead",
                )
            )
        return self._head.detach()[: self.info.vocabulary]

    def close(self) -> None:
        """Free the weights. Modules refer to themselves, so the last reference to them frees nothing by itself, and a
        full collection of garbage, which would find them, stops all threads for tenths of a second."""
        for tensor in (*self._model.parameters(), *self._model.buffers()) if self._owned else ():
            tensor.data = tensor.data.new_empty(0)

    def _hidden(self, batch: Batch, context: _Context | None, items: Sequence[ScoreItem]) -> list[Tensor]:
        """The hidden states [R, H] that predict each member's span, in order of the members."""
        width = max(len(row) for row in batch.rows)
        if context is not None and self._continues and self._spares(context, len(batch.rows)):
            try:
                return self._forward_rows(batch, context.rows(width), items)
            except CannotShare as reason:
                self._copy_from_now_on(reason)
        past = None
        if context is not None:
            past = copy.deepcopy(context.cache)
            past.batch_repeat_interleave(len(batch.rows))
        elif width > self._chunk:
            past = DynamicCache(config=self._model.config)
        return self._forward_rows(batch, past, items)

    def _forward_rows(self, batch: Batch, past: Any, items: Sequence[ScoreItem]) -> list[Tensor]:
        width = max(len(row) for row in batch.rows)
        ids = torch.zeros(len(batch.rows), width, dtype=torch.long)
        for i, row in enumerate(batch.rows):
            ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        ids = ids.to(self._device)
        pieces: list[list[Tensor]] = [[] for _ in batch.rows]
        for start in range(0, max(width, 1), self._chunk):  # nothing precedes a first token: no columns
            found_NLH = self._forward(ids[:, start : start + self._chunk], past)
            for i, (member, row) in enumerate(zip(batch.members, batch.rows)):
                first = max(len(row) - items[member].positions, 0)
                # Cloned, so that a piece does not keep all of its chunk in memory.
                pieces[i].append(found_NLH[i, max(first - start, 0) : max(len(row) - start, 0)].clone())
        return [torch.cat(p) for p in pieces]

    def _cache_of(self, prefix: Int32s) -> DynamicCache:
        ids = torch.from_numpy(prefix.astype(np.int64))[None].to(self._device)
        cache = DynamicCache(config=self._model.config)
        for start in range(0, ids.shape[1], self._chunk):
            self._forward(ids[:, start : start + self._chunk], cache)
        return cache

    def _forward(self, ids_NL: Tensor, past: Any) -> Tensor:
        if not ids_NL.shape[1]:
            return self._head.new_zeros(*ids_NL.shape, self.info.hidden_size)
        with past.attending(self._decoder.config) if isinstance(past, RowCache) else contextlib.nullcontext():
            found = self._decoder(input_ids=ids_NL, past_key_values=past, use_cache=past is not None)
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _spares(self, context: _Context, rows: int) -> bool:
        """Whether no copies are better than copies: always on a CPU; elsewhere one call for each row costs more."""
        return self._device.type == "cpu" or rows * context.nbytes > COPIED_BYTES

    def _copy_from_now_on(self, reason: Exception | str) -> None:
        self._continues = False
        log.info("shared contexts are copied for each row", extra={"teacher": self.info.id, "reason": str(reason)})

    @torch.inference_mode()
    def _probe(self) -> Callable[[Tensor], Tensor] | None:
        """See that hidden states and head give the model's own logits; the cap in between, if it has one.

        Raises:
            TeacherFailed: they do not, so that every score would be wrong.
        """
        bias = getattr(self._model.get_output_embeddings(), "bias", None)
        ids = torch.arange(min(8, self.info.vocabulary), device=self._device)[None]
        expected = self._model(input_ids=ids, use_cache=False).logits[0].float()
        logits = (self._forward(ids, None)[0] @ self._head.T).float()
        tolerance = (1e-4 if self._head.dtype == torch.float32 else 0.05) * max(1.0, float(expected.abs().max()))
        value: float = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None) or 0.0

        def cap(z: Tensor) -> Tensor:
            return torch.tanh(z / value) * value

        if not bool(torch.isfinite(expected).all()):
            found = "logits that are not finite"
        elif bias is None and torch.allclose(logits, expected, atol=tolerance, rtol=0) and not value:
            return None
        elif bias is None and value and torch.allclose(cap(logits), expected, atol=tolerance, rtol=0):
            return cap
        else:
            found = "logits that are no linear or capped map of its last hidden states"
        raise TeacherFailed(
            problem(
                f"teacher {self.info.id!r} computes {found}",
                consequence="It was not loaded",
                remedy="Check its weights, or serve it through another engine",
            )
        )

    @torch.inference_mode()
    def _probe_sharing(self) -> bool:
        """Whether two rows behind a context that they share come out as they do by themselves."""
        ids = torch.arange(2 * 24, device=self._device).reshape(2, 24) % self.info.vocabulary
        ids[1, :16] = ids[0, :16]
        expected = self._forward(ids, None)[:, 16:]
        try:
            cache = DynamicCache(config=self._model.config)
            self._forward(ids[:1, :16], cache)
            found = self._forward(ids[:, 16:], SharedPrefix(cache).rows(8))
        except CannotShare as reason:
            self._copy_from_now_on(reason)
            return False
        tolerance = (1e-4 if self._head.dtype == torch.float32 else 0.05) * max(1.0, float(expected.abs().max()))
        if not torch.allclose(found, expected, atol=tolerance, rtol=0):
            self._copy_from_now_on("its hidden states differ")
            return False
        return True
