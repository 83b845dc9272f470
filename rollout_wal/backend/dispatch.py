"""Tools are called here: an event loop in a thread of its own, so that other rollouts go on meanwhile.

A call is dispatched only by the job's owner: the fence is looked at right before each. The coordinator sees to it that
the tokens before a call are durable, and hears of an answer only once the tools' own log holds it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..episode import BadToolCall, Episodes, ToolResult, Turn
from ..errors import BackendError, LogFenced, problem

log = logging.getLogger(__name__)
#: How long tools may take to let go of their rollouts, once no call runs any more.
_RELEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class Told:
    """A result that no tool gave: what the model got wrong."""

    text: str
    ok: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """A turn was answered: these tokens follow it."""

    rollout: int
    position: int
    token_T: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Failed:
    """A turn cannot be answered."""

    rollout: int
    position: int
    reason: str
    fatal: Exception | None = None
    """Nothing is wrong with the rollout: no turn can be answered any more."""


@dataclass(frozen=True, slots=True)
class Released:
    """The tools have let go of a rollout that is over."""

    rollout: int


Answer = Observed | Failed | Released


class Diverged(Exception):
    """A repeated call was answered with something else than what the log holds."""

    censor_reason = "tools-diverged"


class ParserFailed(Exception):
    """The parser broke its contract."""

    censor_reason = "parser-failed"


class Dispatcher:
    """Answers turns. All methods are for the coordinator's thread.

    Args:
        episodes: the tools and the parser.
        job: identity of the job, part of the rollouts' names.
        owner: the job's epoch; what the tools are told as the attempt.
        check_fence: raises LogFenced once the job has another owner.
        wake: called after an answer was added, from the loop's thread.
    """

    def __init__(
        self, episodes: Episodes, *, job: str, owner: int, check_fence: Callable[[], None], wake: Callable[[], None]
    ) -> None:
        self.answers: deque[Answer] = deque()
        self.calls = 0
        """Dispatched, repeated ones included."""
        self._episodes = episodes
        self._job = job
        self._owner = owner
        self._check_fence = check_fence
        self._wake = wake
        self._slots = asyncio.Semaphore(episodes.concurrency)
        self._known: set[int] = set()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """For the loop alone."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-wal-tools", daemon=True)
        self._thread.start()

    def episode(self, rollout: int) -> str:
        """The name by which the tools know a rollout."""
        return f"{self._job}-{rollout}"

    def knows(self, rollout: int) -> bool:
        """Whether the tools have been called for it by this owner: its earlier calls need not be repeated."""
        return rollout in self._known

    def answer(self, rollout: int, turns: Sequence[Turn], metadata: Mapping[str, Any]) -> None:
        """Answer the last of these turns, after those before it were repeated."""
        self._known.add(rollout)
        asyncio.run_coroutine_threadsafe(self._answer(rollout, list(turns), dict(metadata)), self._loop)

    def release(self, rollout: int) -> None:
        """The rollout is over, or was given up: what still runs for it is left to the tools, and its answer is not
        wanted."""
        self._known.discard(rollout)
        asyncio.run_coroutine_threadsafe(self._release(rollout), self._loop)

    def close(self, grace_s: float) -> None:
        """Wait for what runs, cancel what takes too long, and have the tools let go of everything."""
        if not self._thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._close(grace_s), self._loop).result(grace_s + _RELEASE_S + 5.0)
        except (TimeoutError, asyncio.CancelledError):
            log.warning("tools did not let go in time; what they were doing is in their own log, if they keep one")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    # -- in the loop --------------------------------------------------------------------------------------------

    async def _answer(self, rollout: int, turns: list[Turn], metadata: dict[str, Any]) -> None:
        position = turns[-1].position
        me = asyncio.current_task()
        assert me is not None
        self._tasks[rollout] = me
        answer: Answer
        try:
            async with self._slots:
                for turn in turns:
                    token_T = await self._turn(rollout, turn, metadata)
            answer = Observed(rollout, position, token_T)
        except Exception as error:
            reason = getattr(type(error), "censor_reason", None) or f"tool-failed: {type(error).__name__}"
            fatal = error if isinstance(error, LogFenced) or getattr(type(error), "stops_runner", False) else None
            log.warning("a tool call of rollout %d at output token %d failed: %s", rollout, position, error)
            answer = Failed(rollout, position, reason, fatal)
        finally:
            del self._tasks[rollout]
        self._add(answer)

    async def _turn(self, rollout: int, turn: Turn, metadata: dict[str, Any]) -> NDArray[np.int32]:
        parser = self._episodes.parser
        results: list[ToolResult] = []
        try:
            calls = parser.calls(turn.token_T)
        except BadToolCall as error:
            calls = ()
            results.append(Told(str(error)))
        except Exception as error:
            raise ParserFailed(f"a parser could not read a turn: {type(error).__name__}: {error}") from error
        for call in calls:
            self._check_fence()
            self.calls += 1
            results.append(
                await self._episodes.tools.call(
                    rollout_id=self.episode(rollout),
                    attempt=self._owner,
                    position=turn.position,
                    call=call,
                    metadata=metadata,
                )
            )
        try:
            token_T = np.asarray(parser.observe(results), np.int32)
        except Exception as error:
            raise ParserFailed(f"a parser could not make tokens of results: {type(error).__name__}: {error}") from error
        if not len(token_T):
            raise ParserFailed("a parser made no token of results; the rollout could not go on behind them")
        if turn.observed_T is not None and not np.array_equal(token_T, turn.observed_T):
            raise Diverged(
                problem(
                    f"the calls of rollout {rollout} before output token {turn.position} were repeated, and what came "
                    "back is not what the log holds",
                    consequence="Its tools are not in the state that its tokens speak of, so it does not go on",
                    remedy="Use tools that answer repeated calls from a log, and the same parser as before",
                )
            )
        return token_T

    async def _release(self, rollout: int) -> None:
        if (task := self._tasks.get(rollout)) is not None:
            task.cancel()
            await asyncio.wait({task})
        await self._let_go(rollout)
        self._add(Released(rollout))

    async def _let_go(self, rollout: int) -> None:
        try:
            await self._episodes.tools.release(self.episode(rollout))
        except Exception as error:  # the rollout is over and durable; that is no reason to lose it
            log.warning("tools could not let go of rollout %d: %s", rollout, error)

    async def _close(self, grace_s: float) -> None:
        me = asyncio.current_task()
        running = {task for task in asyncio.all_tasks() if task is not me}
        if running:
            _, late = await asyncio.wait(running, timeout=grace_s)
            for task in late:
                task.cancel()
        known, self._known = self._known, set()
        await asyncio.wait_for(asyncio.gather(*(self._let_go(rollout) for rollout in known)), _RELEASE_S)

    def _add(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._wake()


def stopped(error: Exception) -> BackendError | LogFenced:
    """What the backend stops with when no call can be answered any more."""
    if isinstance(error, LogFenced):
        return LogFenced(str(error))
    return BackendError(
        problem(
            f"tools cannot answer any more: {type(error).__name__}: {error}",
            consequence="The backend stops; its rollouts stay in flight, and no call is repeated on a guess",
            remedy="Cure the cause and start again on the same directory",
        )
    )


def reason_of(error: Exception) -> str:
    """Why a turn whose parser raised this ends its rollout."""
    log.warning("a tool-call parser failed: %s: %s", type(error).__name__, error)
    return ParserFailed.censor_reason
