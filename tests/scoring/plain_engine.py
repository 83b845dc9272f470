"""The plainest engine there could be: transformers, one item at a time, a few tokens at a time.

It runs in an engine's process, so that all around the engine is tested where none is installed. A token id in its
options makes it die, as a batch that takes all memory would.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from typing import Any, ClassVar

import numpy as np
import torch

from rollout_wal import __version__
from scoring.teachers.engine.rows import Ask, Rows, head_pieces
from scoring.teachers.engine.source import EngineTeacherSource


class PlainEngineSource(EngineTeacherSource):
    engine: ClassVar[str] = "plain"
    runner: ClassVar[str] = "plain_engine:PlainRunner"
    decided: ClassVar[frozenset[str]] = frozenset({"dtype"})

    def environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1"}


class PlainRunner:
    def __init__(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._options = config["options"]
        if "fail" in self._options:
            raise ValueError(self._options["fail"])
        self._queue: deque[tuple[int, Any, Rows]] = deque()
        self._vocabulary, self._dtype = config["vocabulary"], config["dtype"]
        if "describe" in self._options:  # to be refused for what it says
            return
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, config["dtype"])
        self._model: Any = AutoModelForCausalLM.from_pretrained(config["folder"], dtype=dtype).eval()

    def describe(self) -> dict[str, Any]:
        found = {"rollout_wal": __version__, "device": "cpu", "dtype": self._dtype, "logits": 1000}
        return {**found, **self._options.get("describe", {})}

    @property
    def unfinished(self) -> int:
        return len(self._queue)

    def add(self, item: int, tokens: bytes, ask: dict[str, Any]) -> None:
        ids = torch.from_numpy(np.frombuffer(tokens, "<i4").astype(np.int64))
        self._queue.append((item, ids, Rows(Ask(**ask), self._vocabulary)))

    def drop(self, items: list[int]) -> None:
        self._queue = deque(entry for entry in self._queue if entry[0] not in items)

    def clean(self) -> None:
        assert not self._queue

    @torch.inference_mode()
    def step(self) -> list[tuple[int, dict[str, Any]]]:
        item, ids, rows = self._queue.popleft()
        if self._options.get("die_on") in ids.tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        for start in range(0, len(ids), 7):
            part = ids[None, start : start + 7]
            hidden = self._model.get_decoder()(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
            rows.take(start, hidden[0], self._logits_of)
        return [(item, rows.outcome())]

    @torch.inference_mode()
    def head(self) -> Any:
        like = torch.zeros(1, self._model.config.hidden_size, dtype=self._model.dtype)
        return head_pieces(self._logits_of, self._vocabulary, like)

    def _logits_of(self, hidden: Any) -> Any:
        logits = self._model.lm_head(hidden)
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits
