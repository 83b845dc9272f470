"""Teachers in engines: what the server knows of them, and how their items get to the engine and back.

Shape legend: P = positions of an item's span, R = those of them that have something before them, C = most candidates.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from rollout_wal import __version__

from ...batching import context_key
from ...errors import BadConfiguration, BadRequest, BadResult, TeacherFailed, mismatch, problem
from ...items import Ragged, ScoreItem, Scores
from ..base import InOrder, TeacherInfo
from ..folder import ModelFolder, vocabulary
from ..hf import loaded_bytes
from .process import EngineProcess

log = logging.getLogger(__name__)

PRECISIONS: Final = ("bfloat16", "float32")
_ITEM_BYTES: Final = {"bfloat16": 2, "float32": 4}
#: Tokens of KV that an engine keeps for itself or loses to whole blocks.
_SPARE_TOKENS: Final = 512
#: Deaths of an engine within one unit of work, after which what is left of it fails.
_DEATHS: Final = 3


class EngineTeacherSource(ABC):
    """A model folder that an engine serves. Use `VllmTeacherSource` or `SglangTeacherSource`.

    Nothing of the engine is imported here: each load starts a process, and evicting the teacher ends it.

    Args:
        teacher: its id.
        folder: written by save_pretrained.
        precision: "bfloat16" or "float32". The scores' provenance names the engine too, as "vllm-bfloat16".
        domains: labels that are routed to it.
        device: "cpu", "cuda" or "cuda:1"; must be what the installed engine is built for.
        token_budget: tokens of a step of the engine.
        share_prefixes: let the engine keep prompts in its prefix cache.
        kv_cache_bytes: memory for KV; 0: for one item of `max_context` beside a step.
        max_context: tokens that it reads; 0: as many as the model, or as the KV cache holds.
        python: interpreter of the environment that has the engine; None: this one. rollout-wal must be installed there.
        threads: of the engine on a CPU; 0: its own choice.
        engine_args: further arguments of the engine's own.

    Raises:
        BadConfiguration: no such model, a precision that the engine does not compute in, arguments that are not its.
    """

    engine: ClassVar[str]
    runner: ClassVar[str]
    #: Positions of the model that the engine does not let a prompt have.
    reserved: ClassVar[int] = 0
    #: Of `engine_args`, those that are decided here.
    decided: ClassVar[frozenset[str]]

    def __init__(
        self,
        teacher: str,
        folder: Path | str,
        *,
        precision: str = "bfloat16",
        domains: Sequence[str] = (),
        device: str = "cpu",
        token_budget: int = 8192,
        share_prefixes: bool = True,
        kv_cache_bytes: int = 0,
        max_context: int = 0,
        python: Path | str | None = None,
        threads: int = 0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.precision, self.device = Path(folder), precision, device
        self.token_budget, self.share_prefixes, self.threads = token_budget, share_prefixes, threads
        self.python = None if python is None else Path(python)
        self.engine_args = dict(engine_args or {})
        if precision not in PRECISIONS or not (self.folder / "config.json").is_file():
            raise _bad(
                teacher,
                f"precision {precision!r} of {self.folder} in {self.engine}",
                f"Name a folder with a config.json, and one of {', '.join(PRECISIONS)}; MXFP4 is for `engine: hf`",
            )
        if clash := sorted(self.decided & set(self.engine_args)):
            raise _bad(
                teacher,
                f"engine_args.{clash[0]} is decided by the server",
                "Leave it out; precision, device, token_budget, kv_cache_bytes and max_context are keys of the teacher",
            )
        self._files = ModelFolder(teacher, self.folder, f"{self.engine}-{precision}")
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        per_token = kv_bytes_per_token(config, _ITEM_BYTES[precision])
        context = config.max_position_embeddings - self.reserved
        if max_context:
            context = min(context, max_context)
        if not kv_cache_bytes:
            kv_cache_bytes = per_token * (context + token_budget + _SPARE_TOKENS)
        self.kv_cache_bytes, self.kv_tokens = kv_cache_bytes, kv_cache_bytes // per_token
        context = min(context, self.kv_tokens - _SPARE_TOKENS)
        if context < 2:
            raise _bad(
                teacher,
                f"kv_cache_bytes={kv_cache_bytes} holds {self.kv_tokens} tokens of {per_token} bytes",
                f"Give it more: at least {per_token * (2 * _SPARE_TOKENS)}",
            )
        self.info = TeacherInfo(
            self._files.provenance,
            vocabulary(config, self.folder),
            context,
            config.hidden_size,
            loaded_bytes(self.folder, precision) + kv_cache_bytes,
            tuple(domains),
        )

    def load(self) -> EngineTeacher:
        """Raises TeacherFailed or ScoreProvenanceMismatch."""
        return EngineTeacher(self.info, self.start, self.token_budget)

    def start(self) -> EngineProcess:
        """A process that has loaded this very checkpoint."""
        self._files.check_unchanged()
        load = {
            "runner": self.runner,
            "rollout_wal": __version__,
            "folder": str(self.folder.absolute()),
            "dtype": self.precision,
            "device": self.device.partition(":")[0],
            "vocabulary": self.info.vocabulary,
            "max_context": self.info.max_context,
            "token_budget": self.token_budget,
            "kv_cache_bytes": self.kv_cache_bytes,
            "kv_tokens": self.kv_tokens,
            "share_prefixes": self.share_prefixes,
            "options": self.engine_args,
        }
        environment = dict(self.environment())
        kind, _, index = self.device.partition(":")
        if kind == "cuda" and index:
            environment["CUDA_VISIBLE_DEVICES"] = index
        if self.threads:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        process = EngineProcess(self.info.id, load, python=self.python, environment=environment)
        try:
            self._check_loaded(process.ready())
            self._files.check_unchanged()  # and not while it was read either
        except BaseException:
            process.end()
            raise
        return process

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """Environment variables of the engine's process."""

    def _check_loaded(self, found: Mapping[str, Any]) -> None:
        kind = self.device.partition(":")[0]
        for what, value, expected in (
            ("the version of rollout-wal in the engine's environment", found["rollout_wal"], __version__),
            ("the device of the engine", found["device"], kind),
            ("the dtype of the engine", found["dtype"], self.precision),
        ):
            if value != expected:
                raise mismatch(f"{what} of teacher {self.info.id!r}", value, expected)
        if found["logits"] < self.info.vocabulary:
            raise mismatch(f"the logits of teacher {self.info.id!r}", found["logits"], self.info.vocabulary)


class EngineTeacher(InOrder):
    """A model that an engine's process holds. See `Teacher`.

    An engine that dies is started anew, with the same checkpoint or not at all, and what it had not answered is asked
    again, one item at a time: whichever kills it then fails, and no other. An item that comes to NaN is asked again
    too, alone and with a clean KV cache: engines reuse its memory, and what another item left there may be to blame.
    """

    def __init__(self, info: TeacherInfo, start: Callable[[], EngineProcess], token_budget: int) -> None:
        self.info, self._start, self._window = info, start, 4 * token_budget
        self._process = start()
        self._serial = 0
        self._clean = True

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    def close(self) -> None:
        """End the engine, and return when its memory is free."""
        self._process.end()

    def stream(
        self, items: Sequence[ScoreItem], wanted: Callable[[int], bool] = lambda _: True
    ) -> Iterator[tuple[int, Scores | Exception]]:
        """See `Teacher`. Items are handed to the engine a few steps ahead; `wanted` is asked when they are."""
        # Those with the same context one after the other: the engine finds it in its prefix cache.
        waiting = deque(sorted(range(len(items)), key=lambda i: (context_key(items[i]), i)))
        doubted: set[int] = set()
        running: dict[int, int] = {}
        deaths = 0
        if not self._process.alive:
            self._revive()
        try:
            while waiting or running:
                if not self._process.alive:
                    deaths += 1
                    why = self._bury()
                    guilty = deaths >= _DEATHS or (len(running) == 1 and doubted.issuperset(running.values()))
                    failed = list(running.values()) if guilty else []
                    if not guilty:  # whoever it was, it is alone next time
                        doubted.update(running.values())
                        waiting.extendleft(reversed(running.values()))
                    if deaths >= _DEATHS:
                        failed += waiting
                        waiting.clear()
                    running.clear()
                    yield from ((i, self._died(why)) for i in failed)
                    if not waiting:
                        return
                    self._process = self._start()
                while waiting and self._may_join(waiting[0], running, doubted, items):
                    i = waiting.popleft()
                    if not wanted(i):
                        continue
                    if not _rows_of(items[i]):  # nothing comes before its only token
                        yield i, self._scores(items[i], None)
                        continue
                    if not running and (i in doubted or not self._clean):
                        self._process.send({"clean": True})
                        self._clean = True
                    self._serial += 1
                    running[self._serial] = i
                    self._process.send(_message(self._serial, items[i]))
                for message in self._process.receive() if running else ():
                    at = running.pop(message.get("id", -1), None)
                    if at is None:
                        continue
                    self._clean &= "arrays" in message
                    if "arrays" not in message and at not in doubted:
                        doubted.add(at)
                        waiting.appendleft(at)
                        continue
                    yield at, self._outcome(items[at], message)
        finally:
            if running and self._process.alive:  # nobody reads on
                self._process.send({"drop": list(running)})

    def head(self) -> Tensor:
        """See `Teacher`."""
        if not self._process.alive:
            self._revive()
        self._process.send({"head": True})
        shape: list[int] | None = None
        half, pieces = False, bytearray()
        while self._process.alive:
            for message in self._process.receive():
                if "head" in message and message["head"] is None:
                    raise BadRequest(
                        problem(
                            f"the logits of teacher {self.info.id!r} are no linear map of its last hidden states",
                            consequence="Hidden states and a head would rebuild other logits, so none is given out",
                            remedy="Ask for top-k or candidate log-probabilities instead",
                        )
                    )
                if "head" in message:
                    shape, half = message["head"]["shape"], message["head"]["bfloat16"]
                elif "piece" in message:
                    pieces += message["piece"]
                elif "end" in message and shape is not None:
                    flat = torch.frombuffer(pieces, dtype=torch.int16 if half else torch.float32)
                    return (flat.view(torch.bfloat16) if half else flat).reshape(shape)
        raise self._died(self._process.why())

    def _may_join(self, i: int, running: Mapping[int, int], doubted: set[int], items: Sequence[ScoreItem]) -> bool:
        if not running:
            return True
        if i in doubted or not doubted.isdisjoint(running.values()):
            return False
        return sum(len(items[j].read_ids()) for j in running.values()) < self._window

    def _revive(self) -> None:
        self._bury()
        self._process = self._start()

    def _bury(self) -> str:
        """End what is left of a dead engine. Returns why it died."""
        self._process.receive()  # its last words
        why = self._process.why()
        log.error("engine died", extra={"teacher": self.info.id, "error": why})
        self._process.end()
        return why

    def _outcome(self, item: ScoreItem, message: Mapping[str, Any]) -> Scores | Exception:
        if "arrays" not in message:
            return TeacherFailed(
                problem(
                    f"teacher {self.info.id!r} computed no score: {message.get('error')}",
                    consequence="The item fails; nothing of it was stored",
                    remedy="Look for NaN in its weights; float16 and bfloat16 overflow in some models",
                )
            )
        try:
            scores = self._scores(item, message["arrays"])
            scores.check_against(item)
        except (BadResult, ValueError) as error:
            return TeacherFailed(str(error))
        return scores

    def _scores(self, item: ScoreItem, arrays: Mapping[str, bytes] | None) -> Scores:
        """Args: arrays: rows of the positions that have something before them; None: there are none."""
        rows, w = item.positions, item.wanted
        missing = rows - _rows_of(item)

        def read(name: str, dtype: str, width: int | None = None) -> Any:
            shape = (rows - missing,) if width is None else (rows - missing, width)
            native = np.dtype(dtype).newbyteorder("=")
            found = np.zeros((0, *shape[1:]), native)
            if arrays is not None:
                found = np.frombuffer(arrays[name], dtype).astype(native).reshape(shape)
            return np.concatenate((np.zeros((missing, *found.shape[1:]), native), found))

        ragged = None
        if item.candidates is not None:
            width = _width(item)
            keep = np.arange(width) < np.diff(item.candidates.offsets)[:, None]
            values = read("candidates", "<f4", width)[keep] if width else np.zeros(0, np.float32)
            ragged = Ragged(values, item.candidates.offsets)
        return self.info.scores_of(
            item,
            np.arange(rows) >= missing,
            logprobs=read("logprobs", "<f4") if w.logprobs else None,
            top_ids=read("top_ids", "<i4", w.top_k) if w.top_k else None,
            top_logprobs=read("top_logprobs", "<f4", w.top_k) if w.top_k else None,
            tail_mass=read("tail_mass", "<f4") if w.top_k else None,
            entropy=read("entropy", "<f4") if w.entropy else None,
            candidate_logprobs=ragged,
            hidden_states=read("hidden_states", "<u2", self.info.hidden_size) if w.hidden_states else None,
        )

    def _died(self, why: str) -> TeacherFailed:
        return TeacherFailed(
            problem(
                f"the engine of teacher {self.info.id!r} died: {why}",
                consequence="The item fails; nothing of it was stored, and the engine is started again",
                remedy="If memory ran out, lower kv_cache_bytes or token_budget; otherwise see standard error",
            )
        )


def kv_bytes_per_token(config: Any, item_bytes: int) -> int:
    """Of a model's KV cache, all layers together. Layers that keep less (sliding windows) count as if they did not.

    Args:
        config: a transformers text configuration.
    """
    layers = int(config.num_hidden_layers)
    if latent := getattr(config, "kv_lora_rank", None):  # multi-head latent attention keeps one vector
        return layers * (int(latent) + int(config.qk_rope_head_dim)) * item_bytes
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return layers * 2 * heads * width * item_bytes


def _rows_of(item: ScoreItem) -> int:
    """Positions of the span that have something before them."""
    return min(item.positions, len(item.read_ids()) - 1)


def _width(item: ScoreItem) -> int:
    return 0 if item.candidates is None else int(np.diff(item.candidates.offsets).max(initial=0))


def _message(serial: int, item: ScoreItem) -> dict[str, Any]:
    read, rows = item.read_ids(), _rows_of(item)
    ask: dict[str, Any] = {
        "first": len(read) - 1 - rows,
        "targets": read[len(read) - rows :].astype("<i8").tobytes(),
        "temperature": item.temperature,
        "entropy": item.wanted.entropy,
        "top_k": item.wanted.top_k,
        "hidden_states": item.wanted.hidden_states,
    }
    if item.candidates is not None and (width := _width(item)):
        # Rows with fewer are filled up with id 0, whose values are not used.
        padded = np.zeros((item.positions, width), "<i8")
        padded[np.arange(width) < np.diff(item.candidates.offsets)[:, None]] = item.candidates.values
        ask |= {"candidates": padded[item.positions - rows :].tobytes(), "width": width}
    # Nothing is predicted from the last token.
    return {"id": serial, "tokens": read[:-1].astype("<i4").tobytes(), "ask": ask}


def _bad(teacher: str, what: str, remedy: str) -> BadConfiguration:
    return BadConfiguration(problem(f"teacher {teacher!r}: {what}", consequence="It was not registered", remedy=remedy))
