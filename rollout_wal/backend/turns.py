"""Where a rollout's turn has ended: is that the end of the rollout, or does it call a tool?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ..engines.base import FinishReason
from ..episode import BadToolCall, Episodes, Span, spans_of, turns_of
from ..job_state import Rollout
from ..tokens import Tokens
from ..wal import RolloutWal
from .dispatch import Answer, Dispatcher, Released, reason_of

log = logging.getLogger(__name__)
_LIMITS = frozenset({FinishReason.MAX_TOKENS, FinishReason.CONTEXT})


class Turns:
    """The rollouts that wait for their tools. For the coordinator's thread."""

    def __init__(self, wal: RolloutWal, episodes: Episodes, wake: Callable[[], None]) -> None:
        self._wal = wal
        self._episodes = episodes
        self._calling: dict[int, int] = {}
        self._releasing: set[int] = set()
        self._closing = False
        self._dispatcher = Dispatcher(
            episodes,
            job=wal.log.writer.segment.log_id.hex(),
            owner=wal.log.epoch,
            check_fence=wal.log.fence.check,
            wake=wake,
        )

    def __len__(self) -> int:
        return len(self._calling)

    def __contains__(self, rollout: int) -> bool:
        return rollout in self._calling

    @property
    def calls(self) -> int:
        """Calls that were dispatched."""
        return self._dispatcher.calls

    def episode(self, rollout: int) -> str:
        """The name by which the tools know a rollout."""
        return self._dispatcher.episode(rollout)

    def take(self, r: Rollout, reason: FinishReason, count: int) -> FinishReason | str:
        """What a rollout that stopped ends with. RUNNING: it goes on; its turn is answered, or left for the next
        start. A string: it must end as censored, and why.

        All of its first `count` output tokens are durable: the engine's log was read back, or its worker told of them.
        """
        info = self._wal.info
        if not r.begin.turns or reason in _LIMITS or info is None:
            return reason
        turns = turns_of(r, self._wal.tokens(r.id)[:count])
        try:
            if not self._episodes.parser.calls(turns[-1].token_T):
                return reason
        except BadToolCall:
            pass  # the model is told
        except Exception as error:
            return reason_of(error)
        if len(turns) > self._episodes.turns_max:
            return FinishReason.TURN_LIMIT
        if len(r.begin.prompt) + count >= info.max_context:
            return FinishReason.CONTEXT  # nothing could be observed behind it
        if self._closing:
            return FinishReason.RUNNING
        self._calling[r.id] = count
        turns = turns[-1:] if self._dispatcher.knows(r.id) else turns
        self._dispatcher.answer(r.id, turns, r.begin.metadata)
        return FinishReason.RUNNING

    def spans(self, r: Rollout, tokens: Tokens) -> tuple[Span, ...]:
        """What the parser calls the parts of a rollout's output. None where it cannot say: it is over, whatever that
        is."""
        try:
            finish = FinishReason(r.finish.reason) if r.finish else FinishReason.RUNNING
            return spans_of(turns_of(r, tokens), self._episodes.parser, finish) if r.begin.turns else ()
        except Exception as error:
            log.warning("a tool-call parser could not say where the calls of rollout %d are: %s", r.id, error)
            return ()

    def answers(self) -> Iterator[Answer]:
        """What has come back since for rollouts that still want it."""
        waiting = self._dispatcher.answers
        while waiting:
            answer = waiting.popleft()
            if isinstance(answer, Released):
                self._releasing.discard(answer.rollout)
                yield answer
            elif self._calling.get(answer.rollout) == answer.position:
                del self._calling[answer.rollout]
                yield answer

    def give_up(self, rollout: int) -> int | None:
        """The rollout ends without its answer. Returns where it stood, if it waited for one."""
        return self._calling.pop(rollout, None)

    def release(self, rollout: int) -> bool:
        """The rollout is over: whether its tools must let go of it first. An answer will say that they have."""
        if not self._dispatcher.knows(rollout) or self._closing:
            return False
        self._releasing.add(rollout)
        self._dispatcher.release(rollout)
        return True

    def releasing(self, rollout: int) -> bool:
        """Whether its tools have still to let go of it."""
        return rollout in self._releasing

    def stop_dispatching(self) -> None:
        """From here on calls are left for the next start."""
        self._closing = True

    def close(self, grace_s: float) -> None:
        """See `Dispatcher.close`. What was answered until then can be had from `answers`."""
        self._closing = True
        self._dispatcher.close(grace_s)
