"""Where a rollout ends: the whole finish predicate over what the logs hold, and stop strings while tokens arrive.

An engine sees the ends that token ids decide. Stop strings are the backend's: it has the text. And what was read back
after a death is looked at whole before anything is decoded further: its last durable token may have been its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from ..engines.base import FinishReason
from ..episode import turn_sampling, turn_start
from ..finish import finish_reason
from ..job_state import Rollout
from ..params import SamplingParams
from ..stops import StopWatch
from ..tokens import Tokens
from ..wal import RolloutWal


class Endings:
    """See the module. For the coordinator's thread."""

    def __init__(self, wal: RolloutWal, model: str) -> None:
        self._wal = wal
        self._stops = StopWatch(model)

    def __len__(self) -> int:
        """How many rollouts are watched for stop strings."""
        return len(self._stops)

    def load_tokenizer(self) -> None:
        """For stop strings; raises what `StopWatch.tokenizer` raises."""
        _ = self._stops.tokenizer

    # -- while tokens arrive ------------------------------------------------------------------------------------

    def watch(self, r: Rollout, tokens: Tokens) -> None:
        """An engine goes on behind these tokens. What is there has been looked at, or the rollout would not go on."""
        sampling = turn_sampling(r.begin)
        if sampling["stop"]:
            least = _least(sampling["min_tokens"], tokens)
            self._stops.watch(r.id, tuple(sampling["stop"]), min_tokens=least, seen=len(tokens))

    def watched(self, rollouts: Iterable[int]) -> list[int]:
        """Those of them that have stop strings."""
        return [r for r in rollouts if r in self._stops]

    def forget(self, rollout: int) -> None:
        """It runs no longer."""
        self._stops.forget(rollout)

    def stopped(self, rollout: int, attempt: int) -> int | None:
        """How many output tokens count, if a stop string has appeared since the last look."""
        stream = self._wal.streams.get((rollout, attempt))
        if stream is None or not stream.length:
            return None

        def last(count: int) -> NDArray[Any]:
            # Beyond this attempt's tokens only in its first moments, and then all of them are few or looked at once.
            return stream.last(count) if count <= stream.length else self._wal.tokens(rollout).token_T[-count:]

        return self._stops.check(rollout, stream.start + stream.length, last)

    # -- over what was read back ----------------------------------------------------------------------------------

    def of(self, r: Rollout) -> tuple[FinishReason, int] | None:
        """Why and with how many output tokens a rollout is over; None if it goes on."""
        assert self._wal.info is not None
        tokens = self._wal.tokens(r.id)
        sampling = SamplingParams.from_dict(turn_sampling(r.begin))
        length = len(tokens)
        if sampling.stop:
            # What earlier turns said has been answered, and what was observed ends nothing.
            least = _least(sampling.min_tokens, tokens)
            cut = StopWatch.first_stop(self._stops.tokenizer, sampling.stop, tokens.token_T, least, seen=turn_start(r))
            if cut is not None:
                return FinishReason.STOP_STRING, cut
        reason = finish_reason(
            int(tokens.token_T[-1]) if length and tokens.sampled_T[-1] else None,
            sampled=int(tokens.sampled_T.sum()),
            length=len(r.begin.prompt) + length,
            sampling=sampling,
            eos_token_ids=self._wal.info.eos_token_ids,
            max_context=self._wal.info.max_context,
        )
        return None if reason is FinishReason.RUNNING else (reason, length)


def _least(min_tokens: int, tokens: Tokens) -> int:
    """The least count of output tokens at which a stop string is heeded: observed ones do not count as sampled."""
    observed = len(tokens) - int(tokens.sampled_T.sum())
    return min_tokens + observed if min_tokens else 0
