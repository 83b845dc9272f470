"""transformers models as teachers: float32, bfloat16, MXFP4, and frozen snapshots of a student.

Shape legend: N = rows of a batch, L = tokens of its longest row, R = scored positions of a row, C = most candidates of
a position, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rollout_kernels.errors import KernelError
from rollout_kernels.logprobs import TokenLogprobs, logprobs_from_hidden, logprobs_from_logits
from rollout_kernels.model import load_packed_model, quantize_model_
from rollout_wal.dataset import Provenance, tokens_crc32c
from rollout_wal.engines.common.identity import chat_template_digest, tokenizer_digest, weights_digest
from rollout_wal.engines.hf.weights import no_progress_bars, own_memory, parameters
from rollout_wal.errors import RolloutWalError

from ..batching import Batch, plan
from ..errors import BadConfiguration, BadRequest, BadResult, TeacherFailed, problem
from ..items import Ragged, ScoreItem, Scores
from .base import TeacherInfo
from .folder import ModelFolder, checkpoint_digest, vocabulary

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "mxfp4": torch.bfloat16,
    "mxfp4-float32": torch.float32,
}
PRECISIONS = tuple(_DTYPES)


class HfTeacherSource:
    """A model folder.

    The digest of its weights is taken once, here. If the files change, loading it again takes it anew, and refuses
    weights that are not those whose scores have been given out.

    Args:
        teacher: its id.
        folder: written by save_pretrained, or packed by `rollout-wal quantize`.
        precision: "float32", "bfloat16", "mxfp4" (bfloat16 arithmetic) or "mxfp4-float32".
        domains: labels that are routed to it.
        token_budget: tokens of a forward, padding included.
        chunk_tokens: columns of a forward; a longer sequence is forwarded in pieces of that many.
        share_prefixes: forward a context that several items have in common once.
    """

    def __init__(
        self,
        teacher: str,
        folder: Path | str,
        *,
        precision: str = "bfloat16",
        domains: Sequence[str] = (),
        device: str = "cpu",
        token_budget: int = 8192,
        chunk_tokens: int = 4096,
        share_prefixes: bool = True,
    ) -> None:
        self.folder, self.precision = Path(folder), precision
        self.device, self.token_budget, self.chunk_tokens = torch.device(device), token_budget, chunk_tokens
        self.share_prefixes = share_prefixes
        if precision not in _DTYPES or not (self.folder / "config.json").is_file():
            raise BadConfiguration(
                problem(
                    f"teacher {teacher!r}: precision {precision!r} of {self.folder}",
                    consequence="It was not registered",
                    remedy=f"Name a folder with a config.json, and one of {', '.join(PRECISIONS)}",
                )
            )
        self._files = ModelFolder(teacher, self.folder, precision)
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        self.info = TeacherInfo(
            self._files.provenance,
            vocabulary(config, self.folder),
            config.max_position_embeddings,
            config.hidden_size,
            loaded_bytes(self.folder, precision),
            tuple(domains),
        )

    def load(self) -> HfTeacher:
        """Raises TeacherFailed or ScoreProvenanceMismatch."""
        teacher = self.info.id
        try:
            self._files.check_unchanged()
            model = _load(self.folder, self.precision)
            if self.device.type == "cpu":
                own_memory(model)
            else:
                model = model.to(self.device)
            self._files.check_unchanged()  # and not while it was read either
            return HfTeacher(model, self.info, self.token_budget, self.chunk_tokens, share_prefixes=self.share_prefixes)
        except (OSError, ValueError, RuntimeError, KernelError, SafetensorError) as error:
            raise TeacherFailed(
                problem(
                    f"teacher {teacher!r} cannot be loaded from {self.folder}: {error}",
                    consequence="Items that ask for it fail; other teachers are not affected",
                    remedy="Repair the folder, then send the items again",
                )
            ) from error


class SnapshotSource:
    """The student itself, as it is now, as a teacher: a frozen copy that later updates do not reach.

    Args:
        model: a transformers causal LM.
        tokenizer_folder: where its tokenizer is, for the digests.
    """

    def __init__(
        self,
        teacher: str,
        model: nn.Module,
        *,
        tokenizer_folder: Path | str,
        domains: Sequence[str] = (),
        token_budget: int = 8192,
        chunk_tokens: int = 4096,
    ) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._budget, self._chunk = token_budget, chunk_tokens
        folder = Path(tokenizer_folder)
        config = self._model.config.get_text_config()  # type: ignore[union-attr, operator]
        parameter = next(self._model.parameters())
        provenance = Provenance(
            teacher,
            weights_digest(parameters(self._model)),
            tokenizer_digest(folder),
            chat_template_digest(folder),
            str(parameter.dtype).removeprefix("torch."),
        )
        self.info = TeacherInfo(
            provenance,
            vocabulary(config, folder),
            config.max_position_embeddings,
            config.hidden_size,
            sum(p.nbytes for p in self._model.parameters()),
            tuple(domains),
        )

    def load(self) -> HfTeacher:
        return HfTeacher(self._model, self.info, self._budget, self._chunk)


class HfTeacher:
    """A model in memory."""

    def __init__(
        self, model: Any, info: TeacherInfo, token_budget: int, chunk_tokens: int, *, share_prefixes: bool = True
    ) -> None:
        self.info, self._share = info, share_prefixes
        self._model = model.eval()
        self._decoder = model.get_decoder()
        self._head: Tensor = model.get_output_embeddings().weight
        self._device = self._head.device
        self._budget, self._chunk = token_budget, chunk_tokens
        self._cap = self._probe()

    def score(self, items: Sequence[ScoreItem]) -> list[Scores]:
        """Scores of all items, in their order. Raises the first error that `stream` gives."""
        out: list[Scores | None] = [None] * len(items)
        for i, outcome in self.stream(items):
            if isinstance(outcome, Exception):
                raise outcome
            out[i] = outcome
        return [scores for scores in out if scores is not None]

    def stream(
        self, items: Sequence[ScoreItem], wanted: Callable[[int], bool] = lambda _: True
    ) -> Iterator[tuple[int, Scores | Exception]]:
        """See `Teacher`. One item's number may differ from what it would be in other company by rounding alone."""
        cache: Any = None
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
                        if len(part.prefix) and cache is None:
                            cache = self._cache_of(part.prefix)
                        results = list(zip(part.members, self._batch(part, cache, items)))
                    except Exception as error:  # whatever a model raises; its company may be fine
                        cache = None
                        results = self._one_by_one(part, items, error)
                if not batch.same_prefix_follows:
                    cache = None
            yield from results

    def _batch(self, batch: Batch, cache: Any, items: Sequence[ScoreItem]) -> list[Scores | Exception]:
        out: list[Scores | Exception] = []
        for i, hidden_RH in zip(batch.members, self._hidden(batch, cache, items)):
            try:
                out.append(self._scores(items[i], hidden_RH))
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
        if self._cap is not None:
            raise BadRequest(
                problem(
                    f"the logits of teacher {self.info.id!r} are capped after its head",
                    consequence="Hidden states and the head alone would rebuild other logits, so it is not given out",
                    remedy="Ask for top-k or candidate log-probabilities instead",
                )
            )
        return self._head.detach()[: self.info.vocabulary]

    def close(self) -> None:
        """Nothing: its memory goes with the last reference."""

    def _hidden(self, batch: Batch, cache: Any, items: Sequence[ScoreItem]) -> list[Tensor]:
        """The hidden states [R, H] that predict each member's span, in order of the members."""
        width = max(len(row) for row in batch.rows)
        ids = torch.zeros(len(batch.rows), width, dtype=torch.long)
        for i, row in enumerate(batch.rows):
            ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        ids = ids.to(self._device)
        past = None
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(batch.rows))
        elif width > self._chunk:
            past = DynamicCache(config=self._model.config)
        pieces: list[list[Tensor]] = [[] for _ in batch.rows]
        for start in range(0, max(width, 1), self._chunk):  # nothing precedes a first token: no columns
            found_NLH = self._forward(ids[:, start : start + self._chunk], past)
            for i, (member, row) in enumerate(zip(batch.members, batch.rows)):
                first = max(len(row) - items[member].positions, 0)
                # Cloned, so that a piece does not keep all of its chunk in memory.
                pieces[i].append(found_NLH[i, max(first - start, 0) : max(len(row) - start, 0)].clone())
        return [torch.cat(p) for p in pieces]

    def _cache_of(self, prefix: Any) -> Any:
        ids = torch.from_numpy(prefix.astype(np.int64))[None].to(self._device)
        cache = DynamicCache(config=self._model.config)
        for start in range(0, ids.shape[1], self._chunk):
            self._forward(ids[:, start : start + self._chunk], cache)
        return cache

    def _forward(self, ids_NL: Tensor, past: Any) -> Tensor:
        if not ids_NL.shape[1]:
            return self._head.new_zeros(*ids_NL.shape, self.info.hidden_size)
        found = self._decoder(input_ids=ids_NL, past_key_values=past, use_cache=past is not None)
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _scores(self, item: ScoreItem, hidden_RH: Tensor) -> Scores:
        rows, w = item.positions, item.wanted
        known = len(hidden_RH)  # one less than rows where the first token has nothing before it
        missing = rows - known
        targets = torch.from_numpy(item.token_ids[item.span[0] + missing : item.span[1]].astype(np.int64))
        some = item.candidates is not None and len(item.candidates.values) > 0
        candidates = _pad(item.candidates, missing) if some and item.candidates is not None else None
        try:
            found = self._logprobs(hidden_RH, targets.to(self._device), item, candidates)
        except KernelError as error:
            raise TeacherFailed(
                problem(
                    f"teacher {self.info.id!r} computed no score: {error}",
                    consequence="The item fails; nothing of it was stored",
                    remedy="Look for NaN in its weights; float16 and bfloat16 overflow in some models",
                )
            ) from error

        def padded(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
            if values is None:
                return None
            return np.concatenate(
                (np.zeros((missing, *values.shape[1:]), _numpy(dtype)), values.to("cpu", dtype).numpy())
            )

        tail = None
        if found.top_logprobs is not None:
            tail = (1.0 - found.top_logprobs.double().exp().sum(-1)).clamp(0.0, 1.0)
        ragged = None
        if item.candidates is not None:
            ragged = _unpad(item.candidates, padded(found.candidate_logprobs))
        hidden = None
        if w.hidden_states:
            bits = hidden_RH.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
            hidden = np.concatenate((np.zeros((missing, hidden_RH.shape[1]), np.uint16), bits))
        scores = Scores(
            span=item.span,
            provenance=self.info.provenance,
            tokens_crc32c=tokens_crc32c(item.token_ids),
            scored_crc32c=tokens_crc32c(item.read_ids()),
            request_key=item.key(self.info.provenance),
            valid=np.arange(rows) >= missing,
            logprobs=padded(found.logprob) if w.logprobs else None,
            top_ids=padded(found.top_indices, torch.int32) if w.top_k else None,
            top_logprobs=padded(found.top_logprobs) if w.top_k else None,
            tail_mass=padded(tail) if w.top_k else None,
            entropy=padded(found.entropy) if w.entropy else None,
            candidate_logprobs=ragged,
            hidden_states=hidden,
        )
        try:
            scores.check_against(item)
        except BadResult as error:
            raise TeacherFailed(str(error)) from error
        return scores

    def _logprobs(self, hidden_RH: Tensor, targets_R: Tensor, item: ScoreItem, candidates: Any) -> TokenLogprobs:
        head = self._head[: self.info.vocabulary]
        options: dict[str, Any] = {
            "temperature": item.temperature,
            "entropy": item.wanted.entropy,
            "top_k": item.wanted.top_k,
            "candidates": None if candidates is None else candidates.to(self._device),
        }
        if self._cap is None:
            return logprobs_from_hidden(hidden_RH, head, targets_R, **options)
        parts = []
        for start in range(0, max(len(hidden_RH), 1), 256):
            rows = slice(start, start + 256)
            logits = self._cap(hidden_RH[rows].float() @ head.float().T)
            if candidates is not None:
                options["candidates"] = candidates[rows].to(self._device)
            parts.append(logprobs_from_logits(logits, targets_R[rows], **options))
        return TokenLogprobs(*(_cat([getattr(p, f) for p in parts]) for f in TokenLogprobs.__slots__))

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


def _load(folder: Path, precision: str) -> Any:
    dtype = _DTYPES[precision]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    if precision.startswith("mxfp4") and packed:
        return load_packed_model(folder, dtype=dtype)
    with no_progress_bars():
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    if absent := sorted(map(str, {*loaded["missing_keys"], *loaded["mismatched_keys"]})):
        raise ValueError(f"its weights lack {len(absent)} tensors such as {absent[:3]}")
    if precision.startswith("mxfp4"):
        quantize_model_(model)
    return model.requires_grad_(False)


def freeze(folder: Path, keep: Path | None) -> Path:
    """A copy of a model folder that later writes to it do not reach, by the digest of what it is now.

    Args:
        keep: where copies are kept and found again; None: a temporary folder, gone with the process.

    Raises:
        BadConfiguration: the folder changes while it is copied, or there is no room for the copy.
    """
    if keep is None:
        temporary = tempfile.mkdtemp(prefix="scoring-frozen-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        keep = Path(temporary)
    try:
        digest = checkpoint_digest(folder)
        names = (digest, tokenizer_digest(folder), chat_template_digest(folder))
        frozen = keep / "frozen" / "-".join(name[:32] or "none" for name in names)
        if not frozen.is_dir():
            frozen.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=frozen.parent))
            skip = shutil.ignore_patterns("checkpoint-*", "optimizer*", "*.part")
            shutil.copytree(folder, part, ignore=skip, dirs_exist_ok=True)
            with contextlib.suppress(OSError):  # another server was faster
                part.rename(frozen)
        found = checkpoint_digest(frozen)
    except OSError as error:
        found, digest = str(error), "a copy"
    if found != digest:
        shutil.rmtree(frozen, ignore_errors=True)
        raise BadConfiguration(
            problem(
                f"{folder} cannot be frozen: {found} is not {digest}",
                consequence="Nothing was registered",
                remedy="Freeze it while nobody writes to it, and see that there is room for a copy",
            )
        )
    return frozen


def loaded_bytes(folder: Path, precision: str) -> int:
    """Memory that a model folder takes at a precision, from the files' headers alone.

    Weights that are packed on loading count as dense, for they are dense first. A folder that is packed already counts
    as packed, though loading it has the whole model dense for a moment.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, 100 << 20)))
            for entry in (header[name] for name in header if name != "__metadata__"):
                begin, end = entry["data_offsets"]
                dense = entry["dtype"] in ("F64", "F32", "F16", "BF16")
                total += math.prod(entry["shape"]) * _DTYPES[precision].itemsize if dense else end - begin
        except (ValueError, KeyError, TypeError):
            total += path.stat().st_size  # loading it will say what is wrong
    return total


def _pad(candidates: Ragged, skip: int) -> Tensor:
    """[rows − skip, C]; rows with fewer are filled up with id 0, whose values are not used."""
    counts = np.diff(candidates.offsets)
    out = np.zeros((len(counts), int(counts.max(initial=0))), np.int64)
    out[np.arange(out.shape[1]) < counts[:, None]] = candidates.values
    return torch.from_numpy(out[skip:])


def _unpad(candidates: Ragged, padded: Any) -> Ragged:
    if padded is None:  # no position has a candidate
        return Ragged(np.zeros(0, np.float32), candidates.offsets)
    keep = np.arange(padded.shape[1]) < np.diff(candidates.offsets)[:, None]
    return Ragged(padded[keep], candidates.offsets)


def _numpy(dtype: torch.dtype) -> Any:
    return np.float32 if dtype == torch.float32 else np.int32


def _cat(parts: list[Tensor | None]) -> Any:
    present = [p for p in parts if p is not None]
    return torch.cat(present) if present else None
