"""The embedded engine: a transformers causal LM with continuous batching, in this process, on CPU or GPU.

A step packs the next token of every decoding request and chunks of those still prefilling into one sequence, runs
the model once, and draws a token for each request whose tokens are all computed. Requests join and leave between steps.

Shape legend: N = rows that draw a token in this step, S = tokens of the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ...errors import BadInput, problem
from ...kv.layout import KvArrays
from ...sampling import draw
from ..base import EngineInfo, FinishReason, Request, StepOutput
from ..common.admission import check_request, check_slot
from ..common.identity import architecture_digest, chat_template_digest, tokenizer_digest, weights_digest
from ..common.requests import RequestTable
from .attention import LEAST_ROWS, DecodeGroup, PrefillChunk, StepAttention
from .kv import KvCache, RequestKv
from .snapshots import from_arrays, layout_of, to_arrays
from .weights import load_model, parameters, replace_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFEngine:
    """See `Engine` for the contract. Build it with `from_folder`.

    Args:
        model: a causal LM from `load_model`; the engine takes it over.
        folder: where the tokenizer files are, for their digests.
        max_batch: requests that run at once; more wait in order of arrival.
        prefill_chunk: prompt tokens that a step computes at most, over all requests; decoding rows come on top.
        policy_version: the version of the weights as they are now.
    """

    def __init__(
        self, model: Any, folder: Path, *, max_batch: int = 64, prefill_chunk: int = 256, policy_version: int = 0
    ) -> None:
        if max_batch < 1 or prefill_chunk < 1:
            raise BadInput(
                problem(
                    f"max_batch={max_batch} and prefill_chunk={prefill_chunk} must both be at least 1",
                    consequence="The engine could never advance a request",
                    remedy="Pass positive numbers",
                )
            )
        config = model.config.get_text_config()
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = config.eos_token_id if eos is None else eos
        eos_token_ids = tuple(int(t) for t in (eos if isinstance(eos, (list, tuple)) else [eos]) if t is not None)
        parameter = next(model.parameters())
        self._model = model
        self._device: torch.device = parameter.device
        self._policy_version = policy_version
        self._prefill_chunk = prefill_chunk
        self._info = EngineInfo(
            engine="hf",
            engine_version=transformers.__version__,
            architecture_digest=architecture_digest(model.config.to_dict()),
            weights_digest=weights_digest(parameters(model)),
            tokenizer_digest=tokenizer_digest(folder),
            chat_template_digest=chat_template_digest(folder),
            vocab_size=int(config.vocab_size),
            max_context=int(config.max_position_embeddings),
            eos_token_ids=eos_token_ids,
            dtype=str(parameter.dtype).removeprefix("torch."),
            extras={"torch": torch.__version__, "device": self._device.type},
        )
        self._table = RequestTable(max_batch, eos_token_ids, self._info.max_context)
        self._kv = KvCache(int(config.num_hidden_layers), max_batch, self._device, parameter.dtype)
        self._layout = layout_of(config, parameter.dtype)
        self._keeps_kv = False
        self._waiting: deque[tuple[Request, RequestKv | None]] = deque()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch: int = 64,
        prefill_chunk: int = 256,
        policy_version: int = 0,
    ) -> HFEngine:
        """Load a local transformers folder; nothing is downloaded. `dtype`: float32, bfloat16 or float16.

        Raises:
            BadInput: no such model, an unknown dtype, or a model whose cache is not attention keys and values.
        """
        if dtype not in _DTYPES:
            raise BadInput(
                problem(
                    f"unknown dtype {dtype!r}", consequence="No model was loaded", remedy=f"Use one of {[*_DTYPES]}"
                )
            )
        folder = Path(folder)
        model = load_model(folder, device=torch.device(device), dtype=_DTYPES[dtype])
        return cls(model, folder, max_batch=max_batch, prefill_chunk=prefill_chunk, policy_version=policy_version)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def unfinished(self) -> int:
        return len(self._table) + len(self._waiting)

    def add(self, request: Request, kv: RequestKv | None = None) -> None:
        """See `Engine.add`. `kv` is what `export_kv` gave for the same tokens under the same weights.

        Raises:
            BadPrompt, BadSampling, BadInput: see `Engine.add`; also a prefix that already ends the rollout.
            KvMismatch: KV of another layout or dtype.
        """
        check_request(request, self._info)
        waiting = any(other.slot == request.slot for other, _ in self._waiting)
        check_slot(request.slot, used=waiting or self._table.row(request.slot) is not None)
        if kv is not None and kv.tokens == 0:
            kv = None
        if kv is not None:
            self._kv.check(kv, self._layout)
            length = len(request.prompt) + len(request.prefix)
            if kv.tokens >= length:
                raise BadInput(
                    problem(
                        f"slot {request.slot}: saved KV of {kv.tokens} tokens for a request of {length}",
                        consequence="The last token must be computed for its logits; the request was not added",
                        remedy="Pass KV of fewer tokens than the request has, or none",
                    )
                )
        self._waiting.append((request, kv))

    def abort(self, slot: int) -> None:
        """See `Engine.abort`."""
        row = self._table.row(slot)
        if row is not None:
            self._remove(row)
        else:
            self._waiting = deque(item for item in self._waiting if item[0].slot != slot)

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """See `Engine.step`.

        Raises:
            BackendError: unusable logits (NaN); names slot and position. No request has advanced: abort the named
                ones and step again.
        """
        self._admit()
        rows = self._table.rows()
        if not len(rows):
            return _NOTHING
        decoding, chunks = self._plan(rows)
        tokens, positions, attention = self._pack(decoding, chunks)
        drawing, at = self._who_draws(decoding, chunks)
        logits = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.from_numpy(at).to(self._device),
            step_attention=attention,
        ).logits[0]
        drawn = draw(logits[: len(drawing)], self._table.sampling_rows(drawing)) if len(drawing) else None
        # From here on nothing fails: the step counts for all of its requests or, before, for none.
        self._table.computed_M[decoding] += 1
        for row, count in chunks:
            self._table.computed_M[row] += count
        if drawn is None:
            return _NOTHING
        slot_N = self._table.slot_M[drawing].astype(np.uint16)
        finish_N = self._table.append(drawing, drawn.token_N.astype(np.int64))
        for row in drawing[finish_N != FinishReason.RUNNING]:
            self._remove(int(row))
        return StepOutput(slot_N, drawn.token_N, drawn.logprob_N, drawn.sampling_logprob_N, finish_N)

    def load_weights(self, source: Path | Mapping[str, Any], version: int) -> None:
        """See `Engine.load_weights`. Running requests keep their tokens; their KV is computed again (but `keep_kv`)."""
        replace_weights(self._model, source)
        self._policy_version = version
        if not self._keeps_kv:
            # KV of the old weights must reach nobody: neither running requests nor those that wait with restored KV.
            self._table.computed_M[:] = 0
            self._waiting = deque((request, None) for request, _ in self._waiting)
        self._info = replace(self._info, weights_digest=weights_digest(parameters(self._model)))

    def export_kv(self, slot: int) -> RequestKv:
        """A copy of what is computed of a running slot; of no tokens if it waits or is unknown."""
        row = self._table.row(slot)
        return RequestKv(0, ()) if row is None else self._kv.export(row, int(self._table.computed_M[row]))

    # -- rollout_wal.kv.SupportsKv --------------------------------------------------------------------------------

    def kv_layout(self) -> Mapping[str, Any]:
        """See `SupportsKv.kv_layout`."""
        return self._layout.describe()

    def kv_tokens(self, slot: int) -> int:
        """See `SupportsKv.kv_tokens`."""
        row = self._table.row(slot)
        return 0 if row is None else int(self._table.computed_M[row])

    def keep_kv(self) -> None:
        """See `SupportsKv.keep_kv`."""
        self._keeps_kv = True
        self._info = replace(self._info, extras={**self._info.extras, "kv_on_update": "keep"})

    def save_kv(self, slot: int) -> KvArrays | None:
        """See `SupportsKv.save_kv`."""
        kv = self.export_kv(slot)
        row = self._table.row(slot)
        if row is None or not kv.tokens:
            return None
        return to_arrays(kv, self._table.tokens_MT[row, : kv.tokens].astype(np.int32))

    def add_with_kv(self, request: Request, kv: KvArrays) -> None:
        """See `SupportsKv.add_with_kv`."""
        kv.check(self._layout)
        self.add(request, from_arrays(kv, next(self._model.parameters()).dtype, self._device))

    def close(self) -> None:
        """Forget all requests and free their KV. The engine must not be used afterwards."""
        self._waiting.clear()
        for row in self._table.rows():
            self._remove(int(row))
        self._kv.arenas.clear()

    def _admit(self) -> None:
        while self._waiting and not self._table.active_M.all():
            request, kv = self._waiting.popleft()
            row = self._table.add(request)
            if kv is not None:
                self._kv.restore(row, kv)
                self._table.computed_M[row] = kv.tokens

    @torch.inference_mode()  # the buffers are made in this mode, and then may be written only in it
    def _remove(self, row: int) -> None:
        self._table.remove(row)
        self._kv.release(row)

    def _plan(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """Rows that decode, in the order of their KV rows, and (row, tokens) of those that prefill, oldest first."""
        table, kv = self._table, self._kv
        pending = table.length_M[rows] - table.computed_M[rows]
        decoding = rows[pending == 1]
        chunks = []
        budget = self._prefill_chunk
        for row in rows[pending > 1]:
            count = min(budget, int(table.length_M[row] - table.computed_M[row]))
            if count:
                chunks.append((int(row), count))
                kv.reserve(int(row), int(table.computed_M[row]) + count)
            budget -= count
        for row in decoding[table.length_M[decoding] > kv.capacity_N[decoding]]:
            kv.reserve(int(row), int(table.length_M[row]))
        # Only now is it settled where each row's KV lies.
        return decoding[np.lexsort((kv.row_N[decoding], kv.arena_N[decoding]))], chunks

    def _pack(
        self, decoding: NDArray[np.int64], chunks: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor, StepAttention]:
        """Token ids and positions of the step, int64 [S] each on the device, and who attends to what."""
        table, kv, device = self._table, self._kv, self._device
        position_N = table.computed_M[decoding]
        tokens, positions = [table.tokens_MT[decoding, position_N]], [position_N]
        parts: list[DecodeGroup | PrefillChunk] = []
        arena_N = kv.arena_N[decoding]
        for index in np.unique(arena_N):
            start, stop = np.searchsorted(arena_N, (index, index + 1))
            members = decoding[start:stop]
            parts.append(DecodeGroup(kv.arenas[index], int(start), kv.row_N[members], position_N[start:stop], device))
        offset = len(decoding)
        for row, count in chunks:
            first = int(table.computed_M[row])
            tokens.append(table.tokens_MT[row, first : first + count])
            positions.append(np.arange(first, first + count))
            arena = kv.arenas[kv.arena_N[row]]
            parts.append(PrefillChunk(arena, int(kv.row_N[row]), offset, count, first, device))
            offset += count
        padding = max(0, LEAST_ROWS - offset)
        tokens.append(np.zeros(padding, dtype=np.int64))
        positions.append(np.zeros(padding, dtype=np.int64))
        packed = torch.from_numpy(np.stack((np.concatenate(tokens), np.concatenate(positions)))).to(device)
        return packed[0], packed[1], StepAttention(tuple(parts), padding)

    def _who_draws(
        self, decoding: NDArray[np.int64], chunks: list[tuple[int, int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that draw a token, and where in the step their logits are (at least LEAST_ROWS places)."""
        rows, at = list(decoding), list(range(len(decoding)))
        end = len(decoding)
        for row, count in chunks:
            end += count
            if self._table.computed_M[row] + count == self._table.length_M[row]:
                rows.append(row)
                at.append(end - 1)
        at += [0] * (LEAST_ROWS - len(at))
        return np.array(rows, dtype=np.int64), np.array(at, dtype=np.int64)


_NOTHING = StepOutput(
    np.empty(0, np.uint16),
    np.empty(0, np.uint32),
    np.empty(0, np.float32),
    np.empty(0, np.float32),
    np.empty(0, np.uint8),
)
