"""The client for callers with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import grpc

from rollout_wal.dataset import Provenance
from rollout_wal.errors import RolloutWalError

from .. import wire
from ..errors import BadConfiguration, BadRequest, Unreachable, problem
from ..items import check_provenance
from ..v1 import scoring_pb2 as pb
from .heads import HeadFolder, HeadReader, TeacherHead
from .options import ClientOptions
from .retry import delay, of_status
from .run import Items, Outcome, Run
from .servers import Server


class AsyncScoringClient:
    """Scores items on servers that have the same teachers. Use as an async context manager.

    The first time that a teacher is named, its checkpoint is pinned: from then on only that checkpoint's scores are
    taken, from whichever server, unless `other_checkpoints` allows others.

    Args:
        targets: host:port of each server.
        pins: checkpoints by teacher that are expected from the start.
    """

    def __init__(
        self, targets: Sequence[str], options: ClientOptions | None = None, *, pins: dict[str, str] | None = None
    ) -> None:
        if not targets:
            raise BadConfiguration(
                problem("no scoring server was named", consequence="Nothing was scored", remedy="Pass host:port")
            )
        self._targets, self._options = list(dict.fromkeys(targets)), options or ClientOptions()
        self.pins = dict(pins or {})
        self._servers: list[Server] = []
        self._watches: list[asyncio.Task[None]] = []
        self._runs: set[Run] = set()
        self._heads: dict[tuple[str, str], TeacherHead] = {}

    async def __aenter__(self) -> AsyncScoringClient:
        self._servers = [Server(target, self._options) for target in self._targets]
        self._watches = [asyncio.create_task(server.watch(self._notify)) for server in self._servers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self._servers))

    async def teachers(self) -> dict[str, dict[str, Any]]:
        """The teachers of each server that can be reached, by target and id.

        Raises:
            Unreachable: none can be. The message says why of each.
        """
        await self._reach(attempts=1)
        return {server.target: dict(server.teachers) for server in self._servers if server.listed}

    async def score(self, items: Items) -> AsyncGenerator[Outcome, None]:
        """(index, scores or why there are none) of every item, in the order in which they come.

        Items may be an iterator of either kind; it is read only as there is room, so it may be as long as you like.
        What was not taken is not computed any further than it is: not taking outcomes stops the servers being fed.

        Raises:
            Unreachable: no server can be reached to begin with.
        """
        await self._reach(self._options.attempts)
        run = Run(self._servers, self._options, items, self.pins)
        self._runs.add(run)
        outcomes = run.outcomes()
        try:
            async for outcome in outcomes:
                yield outcome
        finally:
            self._runs.discard(run)
            await outcomes.aclose()

    async def head(self, teacher: str, expected: Provenance | None = None) -> TeacherHead:
        """The LM head of a teacher: fetched once, checked, and kept (see `ClientOptions.head_folder`).

        Args:
            expected: what it must be of; empty fields expect nothing, but the checkpoint is that of the scores that
                this client has had from the teacher.

        Raises:
            BadRequest: no server has such a teacher, or it has no head that could be used.
            ScoreProvenanceMismatch: of another checkpoint, tokenizer, template or precision.
            Unreachable, BadResult: it could not be fetched whole from any server.
        """
        await self._reach(self._options.attempts)
        failure: RolloutWalError | None = None
        for server in self._servers:
            listed = server.teachers.get(teacher) if server.listed else None
            if listed is None:
                continue
            found = wire.read_provenance(listed.provenance)
            wanted = expected or Provenance("")
            if not wanted.checkpoint:
                wanted = replace(wanted, checkpoint=self.pins.setdefault(teacher, found.checkpoint))
            try:
                check_provenance(found, wanted, teacher)
                return await self._head(server, listed, found)
            except RolloutWalError as error:
                failure = error
        raise failure or BadRequest(
            problem(
                f"no server that can be reached has a teacher {teacher!r}",
                consequence="No head was fetched",
                remedy=f"Name one of {sorted({name for s in self._servers for name in s.teachers})}",
            )
        )

    async def _head(self, server: Server, listed: pb.Teacher, provenance: Provenance) -> TeacherHead:
        key = provenance.source, provenance.checkpoint
        if key in self._heads:
            return self._heads[key]
        folder = HeadFolder(self._options.head_folder) if self._options.head_folder else None
        head = await asyncio.to_thread(folder.get, provenance) if folder else None
        if head is None:
            reader = HeadReader(listed, provenance)
            request = pb.GetTeacherHeadRequest(teacher=provenance.source, expected=wire.provenance_message(provenance))
            try:
                async for message in server.head(request):
                    reader.add(message)
            except grpc.aio.AioRpcError as error:
                raise of_status(server.target, error) from error
            head = await asyncio.to_thread(reader.head)
            if folder:
                await asyncio.to_thread(folder.put, head)
        self._heads[key] = head
        return head

    async def _reach(self, attempts: int) -> None:
        """See that at least one server has said what it has. Raises Unreachable."""
        for attempt in range(1, attempts + 1):
            unknown = [s for s in self._servers if not s.listed and not s.refused]
            await asyncio.gather(*(s.list_teachers() for s in unknown), return_exceptions=True)
            if any(s.listed for s in self._servers):
                return
            if all(s.refused for s in self._servers):
                break
            if attempt < attempts:
                await asyncio.sleep(delay(self._options, attempt))
        why = "; ".join(_one_line(s) for s in self._servers)
        raise Unreachable(
            problem(
                f"no scoring server can be reached ({why})",
                consequence="Nothing was scored",
                remedy="Start one (rollout-wal serve-teachers), or correct address, token and certificates",
            )
        )

    def _notify(self) -> None:
        for run in self._runs:
            run.notify()


def _one_line(server: Server) -> str:
    if isinstance(server.why, grpc.aio.AioRpcError):
        return f"{server.target}: {server.why.code().name} {server.why.details()}"
    return f"{server.target}: {server.why}"
