"""The project's sampler as a logits processor of vLLM's model runner V1.

vLLM's own generator belongs to a request and dies with it: a resumed request would draw noise that was used before.
Here the token is drawn by `rollout_wal.sampling`, keyed by position, from the model's logits, with penalties and limits
that see what was sampled before a resume; and then every other token is masked out, so that whatever vLLM does
afterwards picks this one. A request takes part if its `extra_args` hold a plan, see `plan_of`.

vLLM sends `extra_args` to its engine processes by msgpack, so a plan is plain types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from ...errors import BackendError, problem
from ...params import SamplingParams
from ..base import Request
from ..common.sampler import RowSampler
from .model import context_of, eos_of

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmParams
    from vllm.config import VllmConfig

PLAN: Final = "rollout_wal_plan"


def plan_of(tag: int, request: Request, bad_words: list[list[int]] | None = None) -> dict[str, Any]:
    """How the tokens of a request are drawn, for `SamplingParams.extra_args[PLAN]`.

    Args:
        tag: names the request in what is told of its draws; unique among the running ones.
        request: as for any engine; its prompt and prefix together must be the prompt that vLLM is given.
        bad_words: token sequences that the output must not hold.
    """
    observed = np.flatnonzero(~request.prefix_sampled)
    return {
        "tag": tag,
        "prompt": len(request.prompt),
        "observed": observed.tolist(),
        "key": request.noise_key,
        "sampling": request.sampling.to_dict(),
        **({"bad_words": bad_words} if bad_words else {}),
    }


class PositionNoise(LogitsProcessor):
    """See the module. vLLM makes one per model runner.

    Pass it as `logits_processors=["rollout_wal.engines.vllm.processor:PositionNoise"]`, or `--logits-processors`.
    """

    last: PositionNoise | None = None
    """The one of this process that was made last: an engine that runs in this process asks it for its draws."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows = RowSampler(
            vllm_config.scheduler_config.max_num_seqs, eos_of(vllm_config.model_config), context_of(vllm_config)
        )
        self._at: dict[int, _Member] = {}
        """Requests with a plan by their index in vLLM's batch."""
        self._order: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self.drawn: Drawn = _NOTHING
        PositionNoise.last = self

    @classmethod
    def validate_params(cls, sampling_params: VllmParams) -> None:
        """Called by vLLM's front end for each request."""
        from .request import validate

        validate(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: it decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each step: who is in the batch, and at which index."""
        if batch_update is not None:
            self._order = None
            for index in batch_update.removed:
                self._drop(index)
            for index, params, prompt, output in batch_update.added:
                self._drop(index)
                plan = (params.extra_args or {}).get(PLAN)
                if plan is not None:
                    if prompt is None:
                        raise BackendError(_NO_TOKENS)
                    row = self._rows.add(_request(plan, prompt))
                    self._at[index] = _Member(row, int(plan["tag"]), prompt[plan["prompt"] :], output, plan)
            for a, b, direction in batch_update.moved:
                moving, there = self._at.pop(a, None), self._at.pop(b, None)
                if moving is not None:
                    self._at[b] = moving
                if there is not None:
                    if direction == MoveDirectionality.SWAP:
                        self._at[a] = there
                    else:
                        self._rows.remove(there.row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw for the rows with a plan, and leave each of them its token alone. The others are not touched."""
        if not self._at:
            self.drawn = _NOTHING
            return logits
        for index, member in self._at.items():
            self._rows.follow(member.row, member.output)
            for word in member.bad_words:
                if member.ends_with(word[:-1]):
                    logits[index, word[-1]] = -torch.inf
        if self._order is None:
            index_N = np.array(sorted(self._at), np.int64)
            self._order = index_N, np.array([self._at[i].row for i in index_N], np.int64)
            self._tag_N = np.array([self._at[i].tag for i in index_N], np.int64)
        index_N, row_N = self._order
        where = torch.from_numpy(index_N).to(logits.device)
        everything = len(index_N) == logits.shape[0]
        drawn = self._rows.draw(logits if everything else logits[where], row_N)
        token = torch.from_numpy(drawn.token_N.astype(np.int64)).to(logits.device)
        if everything:
            logits.fill_(-torch.inf)
        else:
            logits[where] = -torch.inf
        logits[where, token] = 0.0
        self.drawn = (self._tag_N, drawn.token_N, drawn.logprob_N, drawn.sampling_logprob_N)
        return logits

    def _drop(self, index: int) -> None:
        gone = self._at.pop(index, None)
        if gone is not None:
            self._rows.remove(gone.row)


Drawn = tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]
"""tag, token, logprob and sampling logprob of the rows of the last step."""

_NOTHING: Drawn = (np.empty(0, np.int64), np.empty(0, np.uint32), np.empty(0, np.float32), np.empty(0, np.float32))
_NO_TOKENS: Final = problem(
    "a rollout was submitted as embeddings instead of tokens",
    consequence="It could not be resumed",
    remedy="Submit token ids",
)


class _Member:
    __slots__ = ("bad_words", "output", "prefix", "row", "tag")

    def __init__(self, row: int, tag: int, prefix: list[int], output: list[int], plan: dict[str, Any]) -> None:
        self.row, self.tag, self.prefix, self.output = row, tag, prefix, output
        self.bad_words: list[list[int]] = plan.get("bad_words", [])

    def ends_with(self, tokens: list[int]) -> bool:
        """Whether the output, prefix included, ends so."""
        count = len(tokens)
        tail = self.output[-count:] if count else []
        if len(tail) < count:
            tail = [*self.prefix[len(tail) - count :], *tail]
        return tail == tokens


def _request(plan: dict[str, Any], prompt: list[int]) -> Request:
    """The inverse of `plan_of`, with the prompt that vLLM was given."""
    tokens = np.array(prompt, np.int32)
    cut = plan["prompt"]
    sampled = np.ones(len(tokens) - cut, np.bool_)
    sampled[plan["observed"]] = False
    return Request(0, tokens[:cut], tokens[cut:], sampled, SamplingParams.from_dict(plan["sampling"]), plan["key"])
