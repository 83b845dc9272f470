"""One call of `score`: which item goes to which server when, and what becomes of those that were not answered.

Nothing polls. Whatever changes (an answer, a server that is up again, an item whose delay has passed) wakes those who
wait for it. An item is in exactly one place: waiting here, in flight on one stream, or handed to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from dataclasses import replace

import grpc

from rollout_wal.errors import RolloutWalError

from .. import wire
from ..errors import BadResult, DeadlinePassed, Overloaded, Unreachable, problem
from ..items import ScoreItem, Scores
from ..v1 import scoring_pb2 as pb
from .choice import Choice, Pending
from .options import ClientOptions
from .retry import ELSEWHERE, FINAL, delay, of_status
from .servers import Server

Items = Iterable[ScoreItem] | AsyncIterable[ScoreItem]
Outcome = tuple[int, Scores | RolloutWalError]


class Run:
    """Items in, outcomes out.

    Args:
        servers: to send to.
        items: taken one after the other as there is room; numbered in order.
        pins: the checkpoint that each teacher is expected to have; added to as teachers are named for the first time.
    """

    def __init__(self, servers: Sequence[Server], options: ClientOptions, items: Items, pins: dict[str, str]) -> None:
        self._servers, self._options = servers, options
        self._choice = Choice(servers, options, pins)
        self._source = _iterate(items)
        self._waiting: deque[Pending] = deque()
        self._results: asyncio.Queue[Outcome | BaseException | None] = asyncio.Queue()  # bounded by _untaken
        self._untaken = 0
        self._taken_on = self._answered = 0
        self._fed = False
        self._changed = asyncio.Event()
        self._doubt = asyncio.Event()
        """Some item may have become hopeless."""

    async def outcomes(self) -> AsyncGenerator[Outcome, None]:
        jobs = [self._feed(), self._give_up()]
        jobs += [self._serve(server) for server in self._servers for _ in range(self._options.streams)]
        tasks = [asyncio.create_task(job) for job in jobs]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            while (found := await self._results.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                self._untaken -= 1
                if self._untaken == self._options.window - 1:
                    self.notify(doubt=False)
                yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.notify()
            await asyncio.sleep(0)  # lets go of what gRPC still awaits of us

    def notify(self, *, doubt: bool = True) -> None:
        """Something changed: wake everybody who waits.

        Args:
            doubt: a server's state is among it, so that there may be items that no server can score.
        """
        self._changed.set()
        self._changed = asyncio.Event()
        if doubt:
            self._doubt.set()

    async def _wait(self, seconds: float | None) -> None:
        """Until something changes, or the time has passed."""
        changed = self._changed.wait()
        with contextlib.suppress(TimeoutError):
            await (changed if seconds is None else asyncio.wait_for(changed, max(0.001, seconds)))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._results.put_nowait(error)

    # -- in and out ---------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        loop = asyncio.get_running_loop()
        async for item in self._source:
            limit = item.deadline_s if item.deadline_s is not None else self._options.timeout_s
            pending = Pending(self._taken_on, item, None if limit is None else loop.time() + limit)
            self._taken_on += 1
            try:
                item.check()
            except RolloutWalError as error:
                self._emit(pending, error)
                continue
            if pending.deadline_s is not None:
                pending.alarm = loop.call_at(pending.deadline_s, self._overdue, pending)
            self._waiting.append(pending)
            self.notify(doubt=not any(self._choice.may(server, pending) for server in self._servers if server.up))
            while len(self._waiting) >= self._options.window or self._untaken >= self._options.window:
                await self._wait(None)
        self._fed = True
        self._finish()

    def _emit(self, pending: Pending, outcome: Scores | RolloutWalError) -> None:
        """Hand an outcome to the caller, the first one alone: what comes after a deadline is dropped."""
        if pending.done:
            return
        pending.done = True
        if pending.alarm is not None:
            pending.alarm.cancel()
        self._untaken += 1
        self._answered += 1
        self._results.put_nowait((pending.index, outcome))
        self._finish()

    def _finish(self) -> None:
        if self._fed and self._answered == self._taken_on:
            self._results.put_nowait(None)

    def _overdue(self, pending: Pending) -> None:
        self._emit(
            pending,
            DeadlinePassed(
                problem(
                    f"no server answered item {pending.index} within its time",
                    consequence="Nothing of it was stored; what still comes of it is dropped",
                    remedy="Allow more time, send less at once, or add servers",
                )
            ),
        )
        self.notify(doubt=False)

    # -- who gets what ------------------------------------------------------------------------------------------

    def _take(self, server: Server) -> Pending | float | None:
        """An item for a server; or after how many seconds there may be one (None: when something changes)."""
        now = asyncio.get_running_loop().time()
        if not server.up or self._untaken >= self._options.window:
            return None
        if server.ready_s > now:
            return server.ready_s - now
        soonest: float | None = None
        for at, pending in enumerate(self._waiting):
            if not self._choice.may(server, pending):
                continue
            if pending.ready_s <= now:
                del self._waiting[at]
                if len(self._waiting) == self._options.window - 1:
                    self.notify(doubt=False)
                return pending
            soonest = min(pending.ready_s - now, soonest if soonest is not None else pending.ready_s - now)
        return soonest

    async def _give_up(self) -> None:
        """Answer items that no server can score, or that have waited for one long enough."""
        while True:
            self._doubt.clear()
            soonest: float | None = None
            for pending in list(self._waiting):
                left = self._hope_s(pending)
                if left is not None:
                    soonest = left if soonest is None else min(soonest, left)
            alive = deque(p for p in self._waiting if not p.done)
            if len(alive) != len(self._waiting):
                self._waiting = alive
                self.notify(doubt=False)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._doubt.wait(), soonest)

    def _hope_s(self, pending: Pending) -> float | None:
        """For how long it is still worth waiting (None: no end is in sight); at the end, the item is answered."""
        able = [server for server in self._servers if self._choice.able(server, pending)]
        if not able:
            self._emit(pending, self._choice.why(pending))
            return None
        if any(server.down_since_s is None for server in able):
            return None
        now = asyncio.get_running_loop().time()
        left = max(s.down_since_s or now for s in able) + self._options.patience_s - now
        if left > 0:
            return left
        reasons = "; ".join(f"{s.target}: {_reason(s.why)}" for s in able)
        self._emit(
            pending,
            Unreachable(
                problem(
                    f"no server for item {pending.index} was up for {self._options.patience_s:g} s ({reasons})",
                    consequence="The item was not scored",
                    remedy="Start one, allow another checkpoint, or have more patience",
                )
            ),
        )
        return None

    # -- the wire -----------------------------------------------------------------------------------------------

    async def _serve(self, server: Server) -> None:
        """Keep one stream to a server, for as long as there are items for it."""
        while not server.refused:
            left = server.ready_s - asyncio.get_running_loop().time()
            if left > 0:
                await asyncio.sleep(left)
            elif not server.listed:
                with contextlib.suppress(grpc.aio.AioRpcError):  # the server has taken note of it
                    await server.list_teachers()
                self.notify()
            else:
                found = self._take(server)
                if isinstance(found, Pending):
                    await self._exchange(server, found)
                else:
                    await self._wait(found)
        self.notify()

    async def _exchange(self, server: Server, first: Pending) -> None:
        """One stream: items go out as answers come in. What is not answered when it ends waits to be sent again."""
        flying: dict[str, Pending] = {str(first.index): first}
        open_results: dict[str, tuple[pb.ScoreResult, wire.Assembler]] = {}
        loop = asyncio.get_running_loop()
        heard_s, silent, over = loop.time(), False, False

        async def requests() -> AsyncIterator[pb.ScoreRequest]:
            nonlocal heard_s
            found: Pending | float | None = first
            # gRPC may ask for more after the call has broken off; what were taken then would be nobody's.
            while not over:
                if isinstance(found, Pending):
                    heard_s = loop.time()
                    flying[str(found.index)] = found
                    for message in wire.item_messages(str(found.index), self._outgoing(found)):
                        yield message
                elif not flying:
                    return
                else:
                    await self._wait(found)
                found = self._take(server) if len(flying) < self._options.window and not over else None

        error: Exception | None = None
        call = server.score(requests())
        watchdog: asyncio.TimerHandle | None = None

        def listen() -> None:
            nonlocal silent, watchdog
            left = heard_s + self._options.silence_s - loop.time()
            if left <= 0:
                silent = True
                call.cancel()
            else:
                watchdog = loop.call_later(left, listen)

        listen()
        try:
            async for message in call:
                heard_s = loop.time()
                pending = flying.get(message.item_id)
                if pending is not None and self._read(server, pending, message, open_results):
                    del flying[message.item_id]
                    open_results.pop(message.item_id, None)
                    self.notify(doubt=message.HasField("error"))
        except grpc.aio.AioRpcError as raised:
            error = raised
        except asyncio.CancelledError:
            if not silent:
                raise
        finally:
            over = True
            if watchdog is not None:
                watchdog.cancel()
            call.cancel()
        # The server broke off, or ended the stream without answering all it was asked.
        if error is not None or flying:
            server.failed(error)
        why = of_status(server.target, error)
        for pending in flying.values():
            self._again(pending, why)
        self.notify()

    def _outgoing(self, pending: Pending) -> ScoreItem:
        item = pending.item
        if pending.deadline_s is not None:  # what is left of it
            left = max(0.001, pending.deadline_s - asyncio.get_running_loop().time())
            item = replace(item, deadline_s=left)
        if self._options.other_checkpoints and item.expected:
            item = replace(item, expected=replace(item.expected, checkpoint=""))
        return item

    def _read(
        self,
        server: Server,
        pending: Pending,
        message: pb.ScoreResponse,
        open_results: dict[str, tuple[pb.ScoreResult, wire.Assembler]],
    ) -> bool:
        """Take in one message. True: the server has nothing more to say about the item."""
        if message.HasField("error"):
            self._refused(server, pending, message.error)
            return True
        try:
            if message.HasField("result"):
                open_results[message.item_id] = message.result, wire.result_assembler(self._options.result_bytes_max)
            if message.item_id not in open_results:
                raise BadResult(
                    problem(
                        f"{server.target} sent arrays of item {pending.index} without saying what they are",
                        consequence="The result was dropped",
                        remedy="See that both ends run the same protocol version",
                    )
                )
            header, assembler = open_results[message.item_id]
            assembler.add(message.chunks)
            if not message.last:
                return False
            self._emit(pending, self._verified(pending, wire.read_result(header, assembler), server))
        except RolloutWalError as error:
            self._again(pending, error)
        return True

    def _verified(self, pending: Pending, scores: Scores, server: Server) -> Scores:
        """The scores, held against what was asked. Raises BadResult or ScoreProvenanceMismatch."""
        item = pending.item
        expected = item.expected
        other = expected is not None and scores.provenance.checkpoint != expected.checkpoint
        if other and expected is not None and self._options.other_checkpoints:
            item = replace(item, expected=replace(expected, checkpoint=""))
        scores.check_against(item)
        return replace(scores, server=server.target, fallback=other)

    def _refused(self, server: Server, pending: Pending, error: pb.ItemError) -> None:
        if error.code in FINAL:
            self._emit(pending, FINAL[error.code](error.message))
        elif error.code in ELSEWHERE:
            pending.excluded[server.target] = ELSEWHERE[error.code](error.message)
            if error.code == pb.ERROR_CODE_PROVENANCE_MISMATCH:
                server.listed = False  # it is not what it said it was: ask again
            self._waiting.appendleft(pending)
        else:
            server.pause(max(0.0, min(error.retry_after_seconds, self._options.patience_s)))
            if error.code == pb.ERROR_CODE_DRAINING:
                server.listed = False
            self._again(pending, Overloaded(error.message, error.retry_after_seconds))

    def _again(self, pending: Pending, why: RolloutWalError) -> None:
        """Let an item wait to be sent again, unless that was tried often or long enough."""
        if pending.done:
            return
        now = asyncio.get_running_loop().time()
        if isinstance(why, Overloaded):
            # A server that lives and says when to come back is no failure; but patience ends.
            since = pending.overloaded_since_s = pending.overloaded_since_s or now
            if now - since >= self._options.patience_s:
                self._emit(pending, why)
                return
            pending.ready_s = now + max(delay(self._options, 1), why.retry_after_s * random.uniform(1.0, 1.5))
        else:
            pending.attempts += 1
            if pending.attempts >= self._options.attempts:
                self._emit(pending, why)
                return
            pending.ready_s = now + delay(self._options, pending.attempts)
        self._waiting.appendleft(pending)


async def _iterate(items: Items) -> AsyncIterator[ScoreItem]:
    """Items of whatever kind of iterable; one that may read from a disk is asked on another thread."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    elif isinstance(items, Sequence):
        for item in items:
            yield item
    else:
        iterator = iter(items)
        while (found := await asyncio.to_thread(lambda: next(iterator, None))) is not None:
            yield found


def _reason(error: Exception | None) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return "it is draining" if error is None else str(error).partition("\n")[0]
