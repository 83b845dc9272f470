"""The output of one rollout, put together from all its attempts and what was observed between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import LogDamaged, problem
from .job_state import Rollout
from .records import Observe
from .stream import Stream, Values


@dataclass(frozen=True, slots=True)
class Tokens:
    """What followed the prompt. T = output tokens, sampled and observed in order."""

    token_T: NDArray[np.int32]
    sampled_T: NDArray[np.bool_]
    """True where the policy sampled the token: its loss mask."""
    logprob: Values
    """Under the model's own distribution; valid only where sampled and logged."""
    sampling_logprob: Values
    """Under the distribution that it was drawn from."""
    version_T: NDArray[np.int64]
    """Policy version; meaningful where sampled_T."""

    @property
    def turn_version_T(self) -> NDArray[np.int64]:
        """Policy version of each token's turn: an observed token has that of the sampled one before it, or if there is
        none of the one after it. For all who judge tokens by their version and do not look at sampled_T."""
        sampled = np.flatnonzero(self.sampled_T)
        if not len(sampled):
            return self.version_T
        before = np.searchsorted(sampled, np.arange(len(self)), side="right") - 1
        return self.version_T[sampled[np.maximum(before, 0)]]

    def __len__(self) -> int:
        return len(self.token_T)

    def __getitem__(self, at: slice) -> Tokens:
        return Tokens(
            self.token_T[at], self.sampled_T[at], self.logprob[at], self.sampling_logprob[at], self.version_T[at]
        )

    @classmethod
    def concat(cls, parts: list[Tokens]) -> Tokens:
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([p.token_T for p in parts]) if parts else np.zeros(0, np.int32),
            np.concatenate([p.sampled_T for p in parts]) if parts else np.zeros(0, np.bool_),
            Values.concat([p.logprob for p in parts]),
            Values.concat([p.sampling_logprob for p in parts]),
            np.concatenate([p.version_T for p in parts]) if parts else np.zeros(0, np.int64),
        )

    @classmethod
    def of_stream(cls, stream: Stream) -> Tokens:
        return cls(
            stream.token_T.astype(np.int32),
            np.ones(stream.length, np.bool_),
            stream.logprob_T,
            stream.sampling_logprob_T,
            stream.version_T,
        )

    @classmethod
    def observed(cls, token_T: NDArray[np.int32]) -> Tokens:
        n = len(token_T)
        return cls(
            np.asarray(token_T, np.int32),
            np.zeros(n, np.bool_),
            Values.missing(n),
            Values.missing(n),
            np.zeros(n, np.int64),
        )


def assemble(rollout: Rollout, stream_of: Callable[[int, int], Stream | None]) -> Tokens:
    """All output tokens that are known of a rollout: its history, told in the order of the log.

    An attempt voids what earlier ones logged beyond its start. Observed tokens void what the engine ran past their
    position: it goes on until it hears that a stop string has ended its turn.

    Raises:
        LogDamaged: an attempt starts, or observed tokens stand, behind tokens that no log holds.
    """
    known = Tokens.concat([])
    for event in rollout.history:
        if isinstance(event, Observe):
            if len(known) < event.position:
                raise _missing(f"tokens observed by rollout {rollout.id} stand", event.position, len(known))
            known = Tokens.concat([known[: event.position], Tokens.observed(event.tokens)])
            continue
        if len(known) < event.start:
            raise _missing(f"attempt {event.attempt} of rollout {rollout.id} starts", event.start, len(known))
        known = known[: event.start]
        if (stream := stream_of(rollout.id, event.attempt)) is not None and stream.length:
            known = Tokens.concat([known, Tokens.of_stream(stream)]) if len(known) else Tokens.of_stream(stream)
    return known


def _missing(what: str, start: int, held: int) -> LogDamaged:
    return LogDamaged(
        problem(
            f"{what} at output token {start}, but the logs hold only the first {held}",
            consequence="The rollout cannot be put together, so nothing of it was delivered",
            remedy="Bring back the engine logs that belong to this job log, or abort the rollout",
        )
    )
