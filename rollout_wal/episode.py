"""Rollouts that call tools: what answers their calls, who reads them, and where their turns end.

    sampled tokens durable ─▶ read as a call ─▶ still the owner? ─▶ Tools.call ─▶ outcome durable there
        ─▶ Observe durable here ─▶ a new attempt goes on behind the observed tokens

A turn ends where the engine stops: at the end of a sequence, or at a stop of the rollout's or of the parser's. The
parser then reads the turn's tokens. No call in them: the rollout is over. A call: it is dispatched, and what came back
is observed (loss mask 0). Whoever dies in between, the same question is asked again of the same tokens, and tools that
keep a log of their own (`sandbox_log.tools.SandboxTools`) answer what they have done already without doing it twice.

Nothing here knows who implements `Tools`: it is a structural protocol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .engines.base import FinishReason
from .errors import BadInput, RolloutWalError, problem
from .job_state import Rollout
from .records import Begin, Observe
from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model asked for."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    span: tuple[int, int] | None = field(default=None, compare=False)
    """The turn's tokens [start, end) that say so. None: the parser does not know; the whole turn counts as the call."""


class BadToolCall(RolloutWalError, ValueError):
    """The model tried to call a tool and got it wrong. The message is what it is told; no tool hears of it."""


class ToolResult(Protocol):
    """What came back."""

    @property
    def text(self) -> str:
        """What the model is told."""
        ...

    @property
    def ok(self) -> bool: ...


class Tools(Protocol):
    """Whoever does what a model asks for.

    An exception of `call` ends the rollout as censored: whether anything happened is not known, so nothing is guessed.
    An attribute of the exception's class may say more: `censor_reason` (str), the reason that is logged, and
    `stops_runner` (True): nothing is wrong with the rollout, but no call can be answered any more (a broken disk,
    another owner); the backend stops, and the rollout stays in flight.
    """

    async def call(
        self, *, rollout_id: str, attempt: int, position: int, call: ToolCall, metadata: Mapping[str, Any]
    ) -> ToolResult:
        """Do it, at most once, and return when its outcome is durable.

        Args:
            rollout_id: safe as a file name, and the same in every life of the job.
            attempt: rises with every new owner of the job, and with nothing else. An owner repeats, in order and with
                the same positions, the calls that a rollout has made before; those are answered and not done again.
            position: output tokens up to and with the end of the call. All of them are durable. Calls of
                one turn share it.
            metadata: the rollout's own, as it was given to `generate`: which image, which task.
        """
        ...

    async def release(self, rollout_id: str) -> None:
        """This owner makes no more calls for the rollout: it is over, or the backend is being closed."""
        ...


class ToolCallParser(Protocol):
    """Reads calls from a turn's tokens and turns results into tokens. Pure: the same in every life of the job.

    A parser may have a method `answer(token_T) -> tuple[int, int] | None`, too: which tokens [start, end) of a
    rollout's last turn are its final answer, as opposed to what was thought before it. Datasets mark them so.
    """

    @property
    def name(self) -> str:
        """Which parser this is. Logged; another one is refused for a rollout that began with this one."""
        ...

    @property
    def stop_token_ids(self) -> Sequence[int]:
        """Tokens that end a turn, besides the end of a sequence."""
        ...

    @property
    def stop(self) -> Sequence[str]:
        """Strings that end a turn."""
        ...

    def calls(self, token_T: NDArray[np.int32]) -> Sequence[ToolCall]:
        """The calls of a turn, in order; none if it is the rollout's last turn.

        Raises:
            BadToolCall: it was meant to be one. Its message is observed in place of a result.
        """
        ...

    def observe(self, results: Sequence[ToolResult]) -> NDArray[np.int32]:
        """The tokens that follow the turn: at least one."""
        ...


@dataclass(frozen=True, slots=True)
class Episodes:
    """What makes the rollouts of a backend episodes: `RolloutBackend(..., episodes=Episodes(tools, parser))`.

    Args:
        tools: called in an event loop of their own thread.
        parser: reads the calls.
        turns_max: turns of a rollout that are answered. A call beyond is not dispatched: the rollout ends with it, and
            with TURN_LIMIT as its finish reason.
        concurrency: rollouts whose calls run at the same time.
    """

    tools: Tools
    parser: ToolCallParser
    turns_max: int = 32
    concurrency: int = 64

    def __post_init__(self) -> None:
        if self.turns_max < 1 or self.concurrency < 1:
            raise BadInput(
                problem(
                    f"turns_max={self.turns_max} and concurrency={self.concurrency} must both be at least 1",
                    consequence="Nothing was started",
                    remedy="Pass positive numbers",
                )
            )

    def record(self) -> dict[str, Any]:
        """What Begin says of it."""
        return {
            "parser": self.parser.name,
            "stop_token_ids": sorted({int(token) for token in self.parser.stop_token_ids}),
            "stop": sorted(set(self.parser.stop)),
            "turns_max": self.turns_max,
        }


def check_episodes(rollouts: Sequence[Rollout], episodes: Episodes | None) -> None:
    """Raises BadInput: rollouts in flight began with other turns, and would go on as something else."""
    now = episodes.record() if episodes is not None else {}
    for r in rollouts:
        if r.begin.turns and r.begin.turns != now:
            raise BadInput(
                problem(
                    f"rollout {r.id} is in flight with turns {r.begin.turns}; this backend has {now or 'no tools'}",
                    consequence="It would read its tokens otherwise than before, so nothing was started",
                    remedy="Pass the Episodes that the job was begun with, until these rollouts are over",
                )
            )


def turn_sampling(begin: Begin) -> dict[str, Any]:
    """The sampling parameters that the engine is given: a turn ends where the rollout or its parser says."""
    if not begin.turns:
        return begin.sampling
    merged = dict(begin.sampling)
    for name in ("stop_token_ids", "stop"):
        merged[name] = sorted({*merged[name], *begin.turns[name]})
    return merged


def turn_start(rollout: Rollout) -> int:
    """Where the present turn begins: output tokens up to and with the last observed one."""
    last = next((h for h in reversed(rollout.history) if isinstance(h, Observe)), None)
    return last.position + len(last.tokens) if last is not None else 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Sampled tokens that ended in calls, and what was observed behind them (None: not yet).

    Args:
        position: output tokens of the rollout up to and with its last.
    """

    position: int
    token_T: NDArray[np.int32]
    observed_T: NDArray[np.int32] | None


def turns_of(rollout: Rollout, tokens: Tokens) -> list[Turn]:
    """A rollout's output as turns, in order. `tokens`: up to the end of the last one, which has no answer yet."""
    turns: list[Turn] = []
    start = 0
    for observe in rollout.observed:
        turns.append(Turn(observe.position, tokens.token_T[start : observe.position], observe.tokens))
        start = observe.position + len(observe.tokens)
    return [*turns, Turn(len(tokens), tokens.token_T[start:], None)]


@dataclass(frozen=True, slots=True)
class Span:
    """Output tokens [start, end) of a rollout, all of them sampled, and what they are."""

    start: int
    end: int
    kind: Literal["tool_call", "final_answer"]


def spans_of(turns: Sequence[Turn], parser: ToolCallParser, finish: FinishReason) -> tuple[Span, ...]:
    """Where a rollout's calls and its final answer are, in order.

    A call is what was answered, or would have been but for `turns_max`; a malformed one is none.

    Args:
        turns: of a rollout that is over: see `turns_of`.
        finish: RUNNING if it was censored.
    """
    answer: Callable[[NDArray[np.int32]], tuple[int, int] | None] | None = getattr(parser, "answer", None)
    spans: list[Span] = []
    for turn in turns:
        first, length = turn.position - len(turn.token_T), len(turn.token_T)
        found: list[tuple[int, int]] = []
        kind: Literal["tool_call", "final_answer"] = "tool_call"
        if turn.observed_T is not None or finish is FinishReason.TURN_LIMIT:
            with contextlib.suppress(BadToolCall):
                found = sorted({call.span or (0, length) for call in parser.calls(turn.token_T)})
        elif finish is not FinishReason.RUNNING and length and answer is not None:
            one = answer(turn.token_T)
            found, kind = ([one] if one is not None else []), "final_answer"
        for start, end in found:
            if not 0 <= start < end <= length:
                raise ValueError(f"tokens [{start}, {end}) of a turn of {length}")
            spans.append(Span(first + start, first + end, kind))
    return tuple(spans)
