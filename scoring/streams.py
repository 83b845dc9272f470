"""One `Score` call: items in, results out, with bounded memory.

What a stream holds is bounded in items and in bytes of their results: its next item is read only when there is room, so
a client that does not read its results stops being read. One that stands still with results unread, or in the middle
of an item, is ended, and what was computed for it stays in the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from rollout_wal.errors import ProvenanceError, RolloutWalError

from . import wire
from .counters import Counters
from .errors import BadRequest, DeadlinePassed, MessageTooLarge, Overloaded, SchedulerFailed, TeacherFailed, problem
from .items import ScoreItem
from .scheduler import Scheduler
from .v1 import scoring_pb2 as pb

log = logging.getLogger(__name__)

_CODES: tuple[tuple[type[Exception], pb.ErrorCode], ...] = (
    (MessageTooLarge, pb.ERROR_CODE_TOO_LARGE),
    (Overloaded, pb.ERROR_CODE_OVERLOADED),
    (DeadlinePassed, pb.ERROR_CODE_DEADLINE_PASSED),
    (TeacherFailed, pb.ERROR_CODE_TEACHER_FAILED),
    (ProvenanceError, pb.ERROR_CODE_PROVENANCE_MISMATCH),
    (BadRequest, pb.ERROR_CODE_BAD_REQUEST),
)
#: Bytes of an item's arrays for each token that it may have: its own, a prefix, candidates.
_BYTES_PER_TOKEN = 64
_ITEM_ID_MAX = 256


class ResultBytes:
    """Bytes of results that are computed or wait to be taken, over all streams."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def fits(self, size: int) -> bool:
        return not self.held or self.held + size <= self.limit


class ScoreStream:
    """One call.

    Args:
        scheduler: who computes.
        context: of the call.
        held: what all streams hold; this one adds to it and takes away again.
        items: that may be in flight.
        result_bytes: of them, unless there is only one.
        stall_s: how long the client may stand still.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        context: Any,
        held: ResultBytes,
        *,
        items: int,
        result_bytes: int,
        stall_s: float,
    ) -> None:
        self._scheduler, self._context, self._all = scheduler, context, held
        self._items_max, self._bytes_max, self._stall_s = items, result_bytes, stall_s
        self._results: asyncio.Queue[tuple[str, Any, int] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._bytes = 0
        self.open_items = 0
        """Accepted, and not taken by the client yet."""
        self.draining = False

    def drain(self) -> None:
        """Take nothing more; end when everything accepted has been taken."""
        self.draining = True
        self._results.put_nowait(None)

    async def messages(self, requests: Any) -> AsyncIterator[pb.ScoreResponse]:
        """What to send, until all is sent or the client is gone."""
        reader = asyncio.create_task(self._read(requests))
        guard = StallGuard(self._stall_s, self._scheduler.counters, self._context)
        try:
            while True:
                found = await self._results.get()
                if found is not None:
                    item_id, outcome, size = found
                    if isinstance(outcome, SchedulerFailed):
                        await self._context.abort(grpc.StatusCode.UNAVAILABLE, str(outcome))
                    for message in _answer_messages(item_id, outcome):
                        guard.start()
                        yield message
                        guard.stop()
                    self.open_items -= 1
                    self._bytes -= size
                    self._all.held -= size
                    self._room.set()
                if reader.done() and (broken := reader.exception()) is not None:
                    await self._refuse(broken)
                if not self.open_items and (self.draining or reader.done()):
                    break
        finally:
            # The client is gone, or everything is sent. What nobody waits for is not computed.
            guard.stop()
            reader.cancel()
            for task in self._tasks:
                task.cancel()
            self._all.held -= self._bytes
            self._bytes = self.open_items = 0

    async def _refuse(self, broken: BaseException) -> None:
        """End the call. From the task that sends: else the status could meet a message under way, and the call hang."""
        if not isinstance(broken, _Broken):
            log.warning("stream cannot be read", extra={"error": repr(broken)})
            broken = _Broken(grpc.StatusCode.INVALID_ARGUMENT, f"a message cannot be read: {type(broken).__name__}")
        await self._context.abort(broken.code, str(broken))

    async def _read(self, requests: Any) -> None:
        try:
            async for item_id, header, assembler in self._parse(requests):
                await self._take(item_id, header, assembler)
        finally:
            self._results.put_nowait(None)

    async def _take(self, item_id: str, header: Any, assembler: wire.Assembler | RolloutWalError) -> None:
        """Accept an item or refuse it; returns when there may be another."""
        while self.open_items >= self._items_max:
            await self._wait_for_room()
        counters, size = self._scheduler.counters, 0
        outcome: Any = assembler
        if self.draining:
            counters.refused_draining += 1
            outcome = None
        elif isinstance(assembler, wire.Assembler):
            try:
                outcome = wire.read_item(header, assembler)
                size = outcome.result_bytes(self._scheduler.teacher_for(outcome).info.hidden_size)
                size = min(size, self._scheduler.limits.max_item_result_bytes)  # what is larger is refused there
                while self.open_items and self._bytes + size > self._bytes_max:
                    await self._wait_for_room()
                if not self._all.fits(size):
                    counters.refused_overload += 1
                    outcome = self._scheduler.overloaded(f"{self._all.held} bytes of results wait to be taken")
            except RolloutWalError as error:
                outcome = error
        if not isinstance(outcome, ScoreItem):
            size = 0
        self.open_items += 1
        self._bytes += size
        self._all.held += size
        if isinstance(outcome, ScoreItem):
            task = asyncio.create_task(self._answer(item_id, outcome, size))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            counters.refused_bad += outcome is not None and not isinstance(outcome, Overloaded)
            self._results.put_nowait((item_id, outcome if outcome is not None else draining(), 0))

    async def _answer(self, item_id: str, item: ScoreItem, size: int) -> None:
        outcome: Any
        try:
            outcome = await self._scheduler.score(item)
        except RolloutWalError as error:
            outcome = error
        except Exception as error:  # a defect of ours: the call ends, and the client asks again
            outcome = SchedulerFailed(f"the server failed: {type(error).__name__}: {error}")
        self._results.put_nowait((item_id, outcome, size))

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()

    async def _parse(self, requests: Any) -> AsyncIterator[tuple[str, Any, Any]]:
        """(id, header, assembler or the error in its place) for each item; one is open at a time."""
        item_id, header = "", None
        assembler: wire.Assembler | RolloutWalError | None = None
        limit = _BYTES_PER_TOKEN * self._scheduler.limits.max_item_tokens + (1 << 16)
        messages = aiter(requests)
        while True:
            try:
                message = await asyncio.wait_for(anext(messages), self._stall_s if header is not None else None)
            except StopAsyncIteration:
                return
            except TimeoutError:
                self._scheduler.counters.stalled_streams += 1
                text = f"item {item_id!r} was left unfinished for {self._stall_s:g} s"
                raise _Broken(grpc.StatusCode.ABORTED, text) from None
            if message.HasField("item"):
                item_id, header, assembler = message.item_id, message.item, wire.item_assembler(limit)
            if header is None or message.item_id != item_id or len(item_id) > _ITEM_ID_MAX:
                raise _Broken(
                    grpc.StatusCode.INVALID_ARGUMENT, "messages of an item must follow each other, its header first"
                )
            if isinstance(assembler, wire.Assembler):
                try:
                    assembler.add(message.chunks)
                except RolloutWalError as error:
                    assembler = error  # its other messages are read and dropped
            if message.last:
                yield item_id, header, assembler
                item_id, header, assembler = "", None, None


class _Broken(Exception):
    """The client broke the protocol."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class StallGuard:
    """Ends the call that runs in this task when its client does not take a message in time.

    The task is cancelled, and all that it holds is free. The status that says why waits in the transport behind the one
    message that nobody took: gRPC gives a server no way to reset a stream.
    """

    def __init__(self, stall_s: float, counters: Counters, context: Any) -> None:
        self._stall_s, self._counters, self._context = stall_s, counters, context
        self._task, self._timer = asyncio.current_task(), asyncio.get_running_loop().call_later(0, lambda: None)

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._end)

    def stop(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self._counters.stalled_streams += 1
        task = asyncio.get_running_loop().create_task(self._say_why())
        _SAYING.add(task)
        task.add_done_callback(_SAYING.discard)
        if self._task is not None:
            self._task.cancel()

    async def _say_why(self) -> None:
        text = f"results were not read for {self._stall_s:g} s; those computed are in the cache, if there is one"
        with contextlib.suppress(Exception):  # an AbortError in any case
            await self._context.abort(grpc.StatusCode.ABORTED, text)


_SAYING: set[asyncio.Task[None]] = set()


def _answer_messages(item_id: str, outcome: Any) -> Iterator[pb.ScoreResponse]:
    if isinstance(outcome, Exception):
        yield pb.ScoreResponse(item_id=item_id, error=item_error(outcome), last=True)
    else:
        yield from wire.result_messages(item_id, outcome)


class Draining(Overloaded):
    """The server is going down; it takes nothing more."""


def draining() -> Draining:
    return Draining(
        problem(
            "this server is going down",
            consequence="The item was not accepted",
            remedy="Send it to another server, or to this one when it is back",
        ),
        1.0,
    )


def item_error(error: Exception) -> pb.ItemError:
    """How an error goes over the wire."""
    if isinstance(error, Draining):
        code = pb.ERROR_CODE_DRAINING
    else:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), pb.ERROR_CODE_TEACHER_FAILED)
    return pb.ItemError(code=code, message=str(error), retry_after_seconds=getattr(error, "retry_after_s", 0.0))
