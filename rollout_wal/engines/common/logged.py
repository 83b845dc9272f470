"""What an engine log holds of one rollout, all its attempts together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engine_state import EngineState
from ...log.reader import LogReader
from ...log.storage import OsStorage
from ...stream import Stream, Values
from ...tokens import Tokens
from ..base import FinishReason
from .routes import Routes, routes_of, shape_of
from .spec import named


@dataclass(frozen=True, slots=True)
class Logged:
    """The durable output of a rollout. T = output tokens, in order."""

    rollout: int
    attempts: int
    """The highest attempt number that is logged; 0: the log has never heard of the rollout."""
    token_T: NDArray[np.int32]
    logprob: Values
    sampling_logprob: Values
    version_T: NDArray[np.int64]
    """The policy version that sampled each token."""
    finish: FinishReason
    routes: Routes | None = None
    """Of the tokens of a mixture-of-experts model; None: the engine logs none."""

    def __len__(self) -> int:
        return len(self.token_T)


def combine(rollout: int, streams: Iterable[Stream], shape: tuple[int, int] | None = None) -> Logged:
    """The attempts of one rollout as one output: a later attempt voids what an earlier one logged beyond its start.

    Args:
        shape: (layers, experts of a token) of the routes that the engine logs.
    """
    known, attempts, finish = Tokens.concat([]), 0, FinishReason.RUNNING
    routes: Routes | None = None
    for stream in sorted(streams, key=lambda s: s.attempt):
        if stream.start > len(known):
            # Its beginning is in another engine's log, or was released: alone it is no prefix of anything.
            known, finish, routes = Tokens.concat([]), FinishReason.RUNNING, None
            attempts = stream.attempt
            continue
        known = Tokens.concat([known[: stream.start], Tokens.of_stream(stream)])
        attempts, finish = stream.attempt, FinishReason(stream.finish)
        if shape is not None:
            mine = routes_of(stream, shape)
            routes = mine if routes is None else Routes.concat([routes[: stream.start], mine])
    return Logged(
        rollout,
        attempts,
        known.token_T,
        known.logprob,
        known.sampling_logprob,
        known.version_T,
        finish,
        routes,
    )


def read_logged(path: str | os.PathLike[str]) -> dict[int, Logged]:
    """What an engine log holds durably, by rollout. Takes no lock: its engine may be alive.

    Raises:
        LogDamaged: a durable frame cannot be read.
    """
    holder = [EngineState()]

    def forget_all() -> None:
        holder[0] = EngineState()

    for frame in LogReader(OsStorage(Path(path), create=False), on_gap=forget_all).read():
        holder[0].apply(frame)
    return by_rollout(holder[0].finish())


def read_named(path: str | os.PathLike[str], name: str | int) -> list[Logged]:
    """What an engine log holds durably of the rollouts that clients asked for under a name.

    Several, if other prompts or parameters were sent under the same name; none, if the log has not heard of it. A
    name that is text is found by its digest of 40 bits.

    Raises:
        LogDamaged: a durable frame cannot be read.
    """
    logged = read_logged(path)
    return [logged[rollout] for rollout in named(logged, [name])]


def by_rollout(state: EngineState) -> dict[int, Logged]:
    """Every rollout of a log's state."""
    streams: dict[int, list[Stream]] = {}
    for (rollout, _), stream in state.streams.items():
        streams.setdefault(rollout, []).append(stream)
    shape = shape_of(state.engine)
    return {rollout: combine(rollout, members, shape) for rollout, members in streams.items()}
