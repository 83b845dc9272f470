"""Drawing for the requests of vLLM's batch that are rollouts, and what was drawn in the last steps.

Both of vLLM's model runners come to the same three things: which rows of the logits are rollouts, at which position
each of them stands, and a logits tensor in which only the drawn token is left. That is here; how a runner tells who is
in its batch is in `batch_v1` and `batch_v2`.

Shape legend: N = rows that are drawn, B = rows of the logits, V = vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ...params import SamplingParams
from ..base import Request
from ..common.sampler import RowSampler

PLAN: Final = "rollout_wal_plan"
_STEPS: Final = 4
"""Steps whose draws are kept. vLLM hands out the outputs of a step one step later at most, in one process."""


def plan_of(tag: int, request: Request, bad_words: list[list[int]] | None = None) -> dict[str, Any]:
    """How the tokens of a request are drawn, for `SamplingParams.extra_args[PLAN]`. Plain types: it travels by msgpack.

    Args:
        tag: names the request in what is told of its draws; 16 bits, unique among the running ones.
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


def request_of(plan: Mapping[str, Any], tokens: list[int]) -> Request:
    """The inverse of `plan_of`, with all tokens that vLLM was given. Those behind the prompt were sampled, but for the
    observed ones: what vLLM sampled before it preempted the request comes back this way too."""
    token_T = np.array(tokens, np.int32)
    cut = plan["prompt"]
    sampled = np.ones(len(token_T) - cut, np.bool_)
    sampled[plan["observed"]] = False
    return Request(0, token_T[:cut], token_T[cut:], sampled, SamplingParams.from_dict(plan["sampling"]), plan["key"])


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rows of one step."""

    tag_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    """Absolute positions of the tokens: the number of tokens before each."""
    token_N: NDArray[np.uint32]
    logprob_N: NDArray[np.float32]
    sampling_logprob_N: NDArray[np.float32]


NOTHING: Final = Drawn(
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.uint32),
    np.empty(0, np.float32),
    np.empty(0, np.float32),
)


@dataclass(frozen=True, slots=True)
class Member:
    """A request of the batch that is a rollout."""

    row: int
    """In the RowSampler."""
    tag: int
    prompt: int
    """Tokens of the rollout's own prompt; what follows is output."""
    start: int
    """Tokens when it joined the batch: nothing is drawn before they are all computed."""
    bad_words: list[list[int]]


class Draws:
    """See the module.

    Args:
        rows: requests that run at once at most.
        eos_token_ids, max_context: of the model.
    """

    def __init__(self, rows: int, eos_token_ids: tuple[int, ...], max_context: int) -> None:
        self.rows = RowSampler(rows, eos_token_ids, max_context)
        self.last: Drawn = NOTHING
        self._known: deque[dict[int, tuple[int, float]]] = deque(maxlen=_STEPS)

    def join(self, plan: Mapping[str, Any], tokens: list[int]) -> Member:
        """A request enters the batch with these tokens."""
        row = self.rows.add(request_of(plan, tokens))
        return Member(row, int(plan["tag"]), plan["prompt"], len(tokens), plan.get("bad_words", []))

    def leave(self, member: Member) -> None:
        self.rows.remove(member.row)

    def forbid(self, logits_BV: torch.Tensor, index: int, member: Member) -> None:
        """Mask the last token of each forbidden word whose beginning is the end of the output."""
        for word in member.bad_words:
            if self.rows.ends_with(member.row, word[:-1], after=member.prompt):
                logits_BV[index, word[-1]] = -torch.inf

    def draw(
        self,
        logits_BV: torch.Tensor,
        index_N: NDArray[np.int64],
        row_N: NDArray[np.int64],
        tag_N: NDArray[np.int64],
    ) -> None:
        """Draw for these rows of the logits, and leave each of them its token alone. The others are not touched.

        Raises:
            BackendError: unusable logits.
        """
        where = torch.from_numpy(index_N).to(logits_BV.device)
        everything = len(index_N) == logits_BV.shape[0]
        drawn = self.rows.draw(logits_BV if everything else logits_BV[where], row_N)
        token = torch.from_numpy(drawn.token_N.astype(np.int64)).to(logits_BV.device)
        if everything:
            logits_BV.fill_(-torch.inf)
        else:
            logits_BV[where] = -torch.inf
        logits_BV[where, token] = 0.0
        self.last = Drawn(tag_N, self.rows.lengths(row_N), drawn.token_N, drawn.logprob_N, drawn.sampling_logprob_N)
        keys = (self.last.position_N << 16 | tag_N).tolist()
        values = zip(drawn.token_N.tolist(), drawn.sampling_logprob_N.tolist(), strict=True)
        self._known.appendleft(dict(zip(keys, values, strict=True)))

    def nothing(self) -> None:
        """No row of this step is a rollout."""
        self.last = NOTHING

    def find(self, tag: int, position: int) -> tuple[int, float] | None:
        """(token, sampling logprob) that was drawn for a request at a position, if that was in the last steps.

        By position, because vLLM may have computed the next step already when it hands out this one's outputs.
        """
        key = position << 16 | tag
        for known in self._known:
            if (found := known.get(key)) is not None:
                return found
        return None
