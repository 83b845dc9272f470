"""SGLang inside a teacher's process: requests of one token each, whose prompts are what is scored.

Its scheduler runs here, one turn at a time. Every forward ends in SGLang's logits processor, which is given the hidden
states of all tokens of the step: there ours looks at them first.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsMetadata
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from rollout_wal import __version__
from rollout_wal.backend.wire import Message
from rollout_wal.engines.common.support import Hook
from rollout_wal.engines.sglang import hooks, versions
from rollout_wal.engines.sglang.scheduler import RELIED_ON, EmbeddedScheduler

from .rows import Ask, Rows, head_pieces

_ROWS: Final = "scoring_rows"
_CPU: Final = {"attention_backend": "torch_native", "sampling_backend": "pytorch", "mem_fraction_static": 0.1}
_LOGITS: Final = "sglang.srt.layers.logits_processor:LogitsProcessor"


class _Asked:
    """The items that run, by request; where the logits processor looks."""

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = {}
        self.processor: Any = None
        self.lm_head: Any = None
        self.metadata: Any = None
        self.like: Any = None

    def logits_of(self, hidden_NH: Any) -> Any:
        return self.processor._get_logits(hidden_NH, self.lm_head, self.metadata, use_logits_buffer=False)


_asked = _Asked()


def look(
    original: Callable[..., Any], self: Any, input_ids: Any, hidden_states: Any, lm_head: Any, batch: Any, *more: Any
) -> Any:
    """AROUND LogitsProcessor.forward: rows of the items in the batch are evaluated, then all goes on as ever."""
    _asked.processor, _asked.lm_head, _asked.like = self, lm_head, hidden_states[:1]
    rids = getattr(batch, "rids", None)
    if rids and batch.forward_mode.is_extend():
        _asked.metadata = LogitsMetadata.from_forward_batch(batch)
        at = 0
        for rid, before, count in zip(rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu):
            if (rows := _asked.rows.get(rid)) is not None:
                rows.take(int(before), hidden_states[at : at + int(count)], _asked.logits_of)
            at += int(count)
    return original(self, input_ids, hidden_states, lm_head, batch, *more)


def longest_prefix(original: Callable[..., Any], req: Any, input_len: int) -> int:
    """AROUND Req._compute_max_prefix_len: what is to be scored is not taken from the radix cache."""
    found: int = original(req, input_len)
    rows = _asked.rows.get(req.rid)
    return found if rows is None else min(found, rows.next_position)


WRAPS: Final = (
    hooks.Wrap(
        Hook(f"{_LOGITS}.forward", ("self", "input_ids", "hidden_states", "lm_head", "logits_metadata")),
        "AROUND",
        look,
    ),
    hooks.Wrap(Hook(f"{hooks.REQ}._compute_max_prefix_len", ("self", "input_len")), "AROUND", longest_prefix),
)
HOOKS: Final = (
    *RELIED_ON,
    Hook(f"{_LOGITS}._get_logits", ("self", "hidden_states", "lm_head", "logits_metadata")),
    Hook("sglang.srt.layers.logits_processor:LogitsMetadata.from_forward_batch", ("cls", "forward_batch")),
)


class SglangRunner:
    """See `main.Runner`. One per process: SGLang keeps its configuration in globals."""

    def __init__(self, config: Message) -> None:
        versions.check()
        hooks.install(WRAPS, HOOKS)
        logging.getLogger("sglang").setLevel(logging.WARNING)
        on_cpu = config["device"] == "cpu"
        args = ServerArgs(
            **{
                "log_level": "warning",
                "schedule_policy": "lpm",  # of those that share a prompt, one goes first
                "max_running_requests": 64,
                "disable_cuda_graph": True,  # prefill alone
                **(_CPU if on_cpu else {}),
                **config["options"],
                "model_path": config["folder"],
                "device": config["device"],
                "dtype": config["dtype"],
                "skip_tokenizer_init": True,
                "chunked_prefill_size": config["token_budget"],
                "max_prefill_tokens": config["token_budget"],
                "max_total_tokens": config["kv_tokens"],
                "disable_radix_cache": not config["share_prefixes"],
                "disable_overlap_schedule": True,
            }
        )
        args.resolve_once()
        args.check_server_args()
        if on_cpu and not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
        self._scheduler = EmbeddedScheduler(args, PortArgs.init_new(args))
        self._scheduler.start()
        if self._scheduler.max_req_input_len < config["max_context"]:
            raise ValueError(
                f"SGLang takes prompts of fewer than {self._scheduler.max_req_input_len} tokens, and the teacher's "
                f"context is {config['max_context']}: lower max_context, or raise kv_cache_bytes"
            )
        self._vocabulary: int = config["vocabulary"]
        self._item_of: dict[str, int] = {}
        self._serial = 0
        self._refused: list[tuple[int, Message]] = []
        # A forward of one token, after which the logits processor and its head are known.
        self.add(-1, np.zeros(1, "<i4").tobytes(), Ask(0, np.zeros(1, "<i8").tobytes()).to_dict())
        while self.unfinished:
            self.step()
        self._logits = int(_asked.logits_of(_asked.like).shape[-1])

    def describe(self) -> Message:
        return {
            "rollout_wal": __version__,
            "device": str(self._scheduler.device),
            "dtype": str(self._scheduler.tp_worker.model_runner.dtype).removeprefix("torch."),
            "logits": self._logits,
        }

    @property
    def unfinished(self) -> int:
        return len(self._item_of)

    def add(self, item: int, tokens: bytes, ask: Message) -> None:
        # SGLang aborts by prefix of the id: of a fixed width, none is the prefix of another.
        self._serial += 1
        rid = f"{self._serial:016x}"
        _asked.rows[rid] = Rows(Ask(**ask), self._vocabulary)
        self._item_of[rid] = item
        params = SamplingParams(max_new_tokens=1, temperature=1.0, top_k=1, ignore_eos=True)
        params.normalize(None)  # what SGLang's front end does
        self._scheduler.process_input_requests(
            [
                TokenizedGenerateReqInput(
                    rid=rid,
                    input_text="",
                    input_ids=array("q", np.frombuffer(tokens, "<i4").astype(np.int64).tobytes()),
                    input_embeds=None,
                    mm_inputs=None,
                    token_type_ids=None,
                    sampling_params=params,
                    return_logprob=False,
                    logprob_start_len=-1,
                    top_logprobs_num=0,
                    token_ids_logprob=None,
                    stream=False,
                )
            ]
        )

    def drop(self, items: list[int]) -> None:
        for rid in [rid for rid, item in self._item_of.items() if item in items]:
            del self._item_of[rid], _asked.rows[rid]
            self._scheduler.abort_request(AbortReq(rid=rid))
        self._scheduler.ended_by_itself()

    def clean(self) -> None:
        self._scheduler.turn()  # in which it takes leave of the last batch
        if self.unfinished or not self._scheduler.flush_cache():
            raise RuntimeError("SGLang does not let go of its radix cache")  # zeros would be taken for KV
        pool = self._scheduler.token_to_kv_pool_allocator.get_kvcache()
        for name in ("k_buffer", "v_buffer", "kv_buffer"):
            for buffer in getattr(pool, name, ()):
                buffer.zero_()

    def step(self) -> list[tuple[int, Message]]:
        ended = [req.rid for req in self._scheduler.turn() if req.finished() and req.rid in self._item_of]
        done = [(self._item_of.pop(rid), _asked.rows.pop(rid).outcome()) for rid in ended]
        # The radix cache is kept from what is to be scored, so nothing has to be read again.
        done = [(i, {"error": "SGLang skipped positions"} if "again" in outcome else outcome) for i, outcome in done]
        for abort in self._scheduler.ended_by_itself():
            if (rid := str(abort.rid)) in self._item_of:
                del _asked.rows[rid]
                done.append((self._item_of.pop(rid), {"error": f"SGLang ended the request: {abort.finished_reason}"}))
        return done

    def head(self) -> Any:
        return head_pieces(_asked.logits_of, self._vocabulary, _asked.like)
