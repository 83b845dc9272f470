"""The rollouts that a scheduler knows, and the drawing of their tokens in place of SGLang's sampler.

SGLang's own seeded sampling does not continue a rollout after a resume: its seeds are ignored unless deterministic
inference is on, its penalties and minimum lengths start anew after each retraction, and its filtered noise is indexed
by rank. So rollouts reach SGLang as greedy requests without penalties; the forward pass leaves the model's own logits,
and from those a token is drawn as `docs/sampling.md` says.

Shape legend: B = rows of SGLang's batch, N = rows of it that draw for a rollout, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import BackendError, problem
from ...finish import finish_reason
from ..base import FinishReason, Request
from ..common.sampler import RowSampler


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn and that the scheduler has yet to append to its request."""

    position: int
    token: int
    logprob: float
    sampling_logprob: float
    version: int
    """Of the weights that it was drawn under; see `Rollouts.version`."""


@dataclass(slots=True)
class Rollout:
    """One rollout while a scheduler knows it. `request.slot` names it here and in the log."""

    request: Request
    req: Any
    """SGLang's own request object; its prompt is ours and the prefix."""
    eos_token_ids: tuple[int, ...]
    max_context: int
    committed: int = 0
    """Output tokens of `req` that were taken."""
    row: int = -1
    """Its row in the sampler; -1 while it does not run."""
    drawn: list[Drawn] = field(default_factory=list)
    """In order of position. With overlapped scheduling the step after is drawn before this one is appended."""
    sampled_before: int = 0
    """Tokens of the prefix that the policy sampled."""

    def __post_init__(self) -> None:
        self.sampled_before = int(np.count_nonzero(self.request.prefix_sampled))

    @property
    def start(self) -> int:
        """Tokens before the first one that is sampled here."""
        return len(self.request.prompt) + len(self.request.prefix)

    def drawn_at(self, position: int) -> Drawn | None:
        return next((d for d in self.drawn if d.position == position), None)

    def finish(self) -> FinishReason:
        """Why it is over with the token that SGLang has appended last; stop strings are not looked for."""
        count = len(self.req.output_ids)
        return finish_reason(
            self.req.output_ids[-1] if count else None,
            sampled=self.sampled_before + count,
            length=self.start + count,
            sampling=self.request.sampling,
            eos_token_ids=self.eos_token_ids,
            max_context=self.max_context,
        )


class Rollouts:
    """The state of all rollouts of one scheduler, by SGLang's request id.

    Args:
        rows: requests that run at once. More may be known; a row is given up while its request does not run.
        eos_token_ids, max_context: what ends a rollout; see `EngineInfo`.
    """

    def __init__(self, rows: int, eos_token_ids: tuple[int, ...], max_context: int) -> None:
        self._rows = rows
        self._eos = eos_token_ids
        self._max_context = max_context
        self._sampler = RowSampler(rows, eos_token_ids, max_context)
        self.by_rid: dict[str, Rollout] = {}
        self.version = 0
        """Of the weights in force. Whoever replaces them sets it."""

    def __len__(self) -> int:
        return len(self.by_rid)

    def add(self, rid: str, request: Request, req: Any) -> Rollout:
        rollout = self.by_rid[rid] = Rollout(request, req, self._eos, self._max_context)
        return rollout

    def remove(self, rid: str) -> Rollout | None:
        rollout = self.by_rid.pop(rid, None)
        if rollout is not None:
            self._give_up_row(rollout)
        return rollout

    # -- drawing ------------------------------------------------------------------------------------------------

    def draw(self, rids: Sequence[str], length_B: NDArray[np.int64], extends: bool, logits_BV: Tensor) -> Tensor | None:
        """Draw for the rollouts of a batch. Called with the logits as the model gave them.

        Args:
            rids: of the batch's requests.
            length_B: tokens of each request so far, which is the absolute position of the next.
            extends: a prefill, whose requests may be unfinished chunks: those draw nothing.

        Returns:
            int64 [N, 2], rows and tokens, on the device of the logits; None if no row is a rollout's. The
            log-probabilities of each are the last of its rollout's `drawn`.

        Raises:
            BackendError: the scheduler is at a position that this rollout has not reached, or unusable logits.
        """
        at: list[int] = []
        members: list[Rollout] = []
        for row, rid in enumerate(rids):
            rollout = self.by_rid.get(rid)
            # SGLang throws away what is sampled for a chunk of a longer prefill.
            if rollout is not None and not (extends and len(rollout.req.full_untruncated_fill_ids) > length_B[row]):
                at.append(row)
                members.append(rollout)
        if not at:
            return None
        index = np.array(at)
        length_N = length_B[index]
        running = {id(rollout) for rollout in members}
        for rollout, length in zip(members, length_N.tolist(), strict=True):
            self._advance(rollout, length, running)
        where = torch.from_numpy(index).to(logits_BV.device)
        out = self._sampler.draw(logits_BV[where], np.array([r.row for r in members], np.int64))
        columns = (length_N, out.token_N, out.logprob_N, out.sampling_logprob_N)
        for rollout, position, token, logprob, sampling_logprob in zip(
            members, *(column.tolist() for column in columns), strict=True
        ):
            new = Drawn(position, token, logprob, sampling_logprob, self.version)
            # A token beyond it was drawn for a step that SGLang took back.
            rollout.drawn = [d for d in rollout.drawn if d.position < new.position]
            rollout.drawn.append(new)
        return torch.stack((where, torch.from_numpy(out.token_N.astype(np.int64)).to(logits_BV.device)), dim=1)

    def _advance(self, rollout: Rollout, length: int, running: set[int]) -> None:
        """Have the rollout's row stand at this length."""
        output = rollout.req.output_ids
        missing = length - rollout.start - len(output)
        if missing == 1 and rollout.drawn_at(length - 1) is not None:
            output = [*output, -1]  # overlapped: drawn in the step before, and not appended yet
        elif missing != 0:
            raise BackendError(
                problem(
                    f"slot {rollout.request.slot}: the scheduler samples position {length}, but "
                    f"{rollout.start + len(output)} tokens of the rollout are known",
                    consequence="Its noise and penalties would be those of another position; nothing was drawn",
                    remedy="Report this with the SGLang version: its scheduler keeps tokens elsewhere",
                )
            )
        if rollout.row < 0:
            if len(self._sampler) == self._rows:
                self._give_up_row(next(r for r in self.by_rid.values() if r.row >= 0 and id(r) not in running))
            rollout.row = self._sampler.add(rollout.request)
            if missing:
                output = [*rollout.req.output_ids, rollout.drawn_at(length - 1).token]  # type: ignore[union-attr]
        self._sampler.follow(rollout.row, output)

    def _give_up_row(self, rollout: Rollout) -> None:
        if rollout.row >= 0:
            self._sampler.remove(rollout.row)
            rollout.row = -1

    # -- committing ---------------------------------------------------------------------------------------------

    @staticmethod
    def commit(rollout: Rollout) -> Drawn | None:
        """The token that SGLang has appended to a request since the last call; None if it appended none.

        Raises:
            BackendError: SGLang appended another number of tokens than were drawn, or another token.
        """
        output = rollout.req.output_ids
        if len(output) == rollout.committed:
            return None
        drawn = rollout.drawn_at(rollout.start + rollout.committed)
        if len(output) != rollout.committed + 1 or drawn is None or output[-1] != drawn.token:
            raise BackendError(
                problem(
                    f"slot {rollout.request.slot}: SGLang appended the tokens {list(output[rollout.committed :])}, "
                    f"and {[d.token for d in rollout.drawn]} were drawn",
                    consequence="Tokens and log-probabilities would not belong together; the step was not logged",
                    remedy="Turn off what samples elsewhere (speculative decoding, other plug-ins), or report this",
                )
            )
        rollout.committed += 1
        rollout.drawn = [d for d in rollout.drawn if d.position > drawn.position]
        return drawn
