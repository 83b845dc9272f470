"""The scoring service over gRPC: the three calls, health, and how a server starts, drains and stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from crc32c import crc32c
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from rollout_wal.errors import ProvenanceError, RolloutWalError

from . import wire
from .auth import BearerTokens, server_credentials
from .errors import BadConfiguration, BadRequest, Overloaded, problem
from .items import check_provenance
from .scheduler import Scheduler
from .streams import ResultBytes, ScoreStream, StallGuard
from .v1 import scoring_pb2 as pb
from .v1 import scoring_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

#: A chunk, and room for what describes it.
MESSAGE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server listens.

    Args:
        address: host:port; port 0 chooses one.
        tokens: bearer tokens, of which a caller must show one; none: anybody may call.
        certificate, private_key: PEM files; none: no encryption.
        client_authorities: PEM file of authorities whose clients may call (mTLS).
        calls: that may be open at once; more are refused as RESOURCE_EXHAUSTED.
        stream_items: items of one stream that may be in flight.
        stream_result_bytes: of the results of those, unless it is a single one.
        result_bytes: of the results of all streams, computed or not taken yet.
        stall_s: a client that stands still for so long, results unread or an item unfinished, is sent away.
        reflection: let clients ask for the protocol.
    """

    address: str = "127.0.0.1:0"
    tokens: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    client_authorities: Path | None = None
    calls: int = 256
    stream_items: int = 128
    stream_result_bytes: int = 256 << 20
    result_bytes: int = 2 << 30
    stall_s: float = 120.0
    reflection: bool = False


class ScoringServicer(pb_grpc.TeacherScoringServiceServicer):
    """The three calls."""

    def __init__(
        self,
        scheduler: Scheduler,
        stream_items: int = 128,
        *,
        stream_result_bytes: int = 256 << 20,
        result_bytes: int = 2 << 30,
        stall_s: float = 120.0,
    ) -> None:
        self._scheduler = scheduler
        self._stream_items, self._stream_result_bytes, self._stall_s = stream_items, stream_result_bytes, stall_s
        self.held = ResultBytes(result_bytes)
        self.streams: set[ScoreStream] = set()
        self.draining = False

    @property
    def open_items(self) -> int:
        """Items that were accepted and whose results have not been taken yet."""
        return sum(stream.open_items for stream in self.streams)

    def drain(self) -> None:
        self.draining = True
        for stream in self.streams:
            stream.drain()

    async def ListTeachers(self, request: Any, context: Any) -> pb.ListTeachersResponse:
        failures = self._scheduler.failures
        teachers = [
            pb.Teacher(
                provenance=wire.provenance_message(source.info.provenance),
                domains=source.info.domains,
                vocabulary=source.info.vocabulary,
                max_context=source.info.max_context,
                hidden_size=source.info.hidden_size,
                resident=name in self._scheduler.room.teachers,
                failure=failures.get(name, ""),
            )
            for name, source in self._scheduler.sources.items()
        ]
        limits = self._scheduler.limits
        return pb.ListTeachersResponse(
            teachers=teachers, max_item_tokens=limits.max_item_tokens, max_queued_tokens=limits.max_queued_tokens
        )

    async def Score(self, requests: Any, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        stream = ScoreStream(
            self._scheduler,
            context,
            self.held,
            items=self._stream_items,
            result_bytes=self._stream_result_bytes,
            stall_s=self._stall_s,
        )
        stream.draining = self.draining
        self.streams.add(stream)
        try:
            async for message in stream.messages(requests):
                yield message
        finally:
            self.streams.discard(stream)

    async def GetTeacherHead(self, request: Any, context: Any) -> AsyncIterator[pb.GetTeacherHeadResponse]:
        source = self._scheduler.sources.get(request.teacher)
        try:
            if source is None:
                raise BadRequest(
                    problem(
                        f"there is no teacher {request.teacher!r}",
                        consequence="No head was sent",
                        remedy=f"Name one of {sorted(self._scheduler.sources)}",
                    )
                )
            if request.HasField("expected"):
                check_provenance(source.info.provenance, wire.read_provenance(request.expected))
            head = await self._scheduler.head(request.teacher)
        except ProvenanceError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except BadRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Overloaded as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except RolloutWalError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        assert source is not None
        dtype = pb.DTYPE_BFLOAT16 if head.bfloat16 else pb.DTYPE_FLOAT32
        at = checksum = 0
        guard = StallGuard(self._stall_s, self._scheduler.counters, context)
        try:
            for piece in head.pieces():
                chunk = pb.ArrayChunk(kind=pb.ARRAY_KIND_HEAD_WEIGHT, dtype=dtype, byte_offset=at, data=piece)
                message = pb.GetTeacherHeadResponse(chunks=[chunk])
                if at == 0:
                    message.chunks[0].shape.extend((head.rows, head.columns))
                    message.provenance.CopyFrom(wire.provenance_message(source.info.provenance))
                guard.start()
                yield message
                guard.stop()
                at, checksum = at + len(piece), crc32c(piece, checksum)
        except OSError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the head cannot be read: {error}")
        finally:
            guard.stop()
        if checksum != head.crc32c:
            head.discard()
            text = "the head was damaged on the server's disk; it will be made anew when it is asked for again"
            await context.abort(grpc.StatusCode.UNAVAILABLE, text)
        yield pb.GetTeacherHeadResponse(last=True, arrays_crc32c=checksum)


class ScoringServer:
    """A running server. Use `await serve(...)`."""

    def __init__(self, scheduler: Scheduler, options: ServerOptions) -> None:
        self.scheduler, self.options = scheduler, options
        self.port = 0
        self._servicer = ScoringServicer(
            scheduler,
            options.stream_items,
            stream_result_bytes=options.stream_result_bytes,
            result_bytes=options.result_bytes,
            stall_s=options.stall_s,
        )
        self._health = HealthServicer()
        self._watch: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

        def refused() -> None:
            scheduler.counters.refused_token += 1

        self._server = grpc.aio.server(
            interceptors=[BearerTokens(options.tokens, refused)] if options.tokens else [],
            maximum_concurrent_rpcs=options.calls,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.max_concurrent_streams", options.calls),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        pb_grpc.add_TeacherScoringServiceServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    @property
    def draining(self) -> bool:
        return self._servicer.draining

    @property
    def open_streams(self) -> int:
        return len(self._servicer.streams)

    @property
    def open_items(self) -> int:
        """Items that were accepted and whose results have not been taken yet."""
        return self._servicer.open_items

    @property
    def result_bytes(self) -> int:
        """Of their results, at most."""
        return self._servicer.held.held

    async def start(self) -> None:
        """Raises BadConfiguration: the address, or the certificates, cannot be used."""
        options = self.options
        if options.reflection:
            from grpc_reflection.v1alpha import reflection

            service = pb.DESCRIPTOR.services_by_name["TeacherScoringService"].full_name
            reflection.enable_server_reflection((service, reflection.SERVICE_NAME), self._server)
        try:
            if options.certificate and options.private_key:
                credentials = server_credentials(options.certificate, options.private_key, options.client_authorities)
                self.port = self._server.add_secure_port(options.address, credentials)
            elif options.certificate or options.private_key or options.client_authorities:
                raise OSError("a certificate needs its private key, and client authorities need both")
            else:
                self.port = self._server.add_insecure_port(options.address)
            if not self.port:
                raise OSError("the address is not free, or not of this machine")
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, BadConfiguration):
                raise
            raise BadConfiguration(
                problem(
                    f"cannot listen on {options.address}: {error}",
                    consequence="The server did not start",
                    remedy="Choose a free address, and PEM files that belong together",
                )
            ) from error
        self.scheduler.start()
        await self._server.start()
        self._watch = asyncio.create_task(self._report_health())
        log.info("server listens", extra={"address": options.address, "port": self.port})

    async def drain(self, grace_s: float = 60.0) -> bool:
        """Take nothing more, answer what was accepted, stop. True if all of it was taken within the time.

        Streams end by themselves when their results are taken. Within the grace, nothing that was accepted is lost;
        after it, what was computed is in the cache, if there is one.
        """
        self._servicer.drain()
        await self._health.enter_graceful_shutdown()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._servicer.streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        done = not self._servicer.streams
        log.info("server drained", extra={"all_answered": done})
        await self.stop(2.0 if done else 0.0)
        return done

    async def stop(self, grace_s: float | None = None) -> None:
        if self._watch:
            self._watch.cancel()
        await self._server.stop(grace_s)
        await self.scheduler.stop()
        self._ended.set()

    async def wait(self) -> None:
        """Until the server has stopped, or its scheduler has failed; see `Scheduler.crashed`."""
        crashed = asyncio.create_task(self.scheduler.crashed.wait())
        ended = asyncio.create_task(self._ended.wait())
        await asyncio.wait((crashed, ended), return_when=asyncio.FIRST_COMPLETED)
        for task in (crashed, ended):
            task.cancel()

    async def _report_health(self) -> None:
        """A service per teacher, "teacher/<id>"; the whole as "" and by the service's name."""
        service = pb.DESCRIPTOR.services_by_name["TeacherScoringService"].full_name
        states = {True: health_pb2.HealthCheckResponse.SERVING, False: health_pb2.HealthCheckResponse.NOT_SERVING}
        said: dict[str, bool] = {}
        while True:
            healthy, failing = self.scheduler.healthy(), self.scheduler.failures
            now = {"": healthy, service: healthy}
            now.update({f"teacher/{t}": healthy and t not in failing for t in self.scheduler.sources})
            for name, good in now.items():
                if said.get(name) != good:
                    await self._health.set(name, states[good])
                    said[name] = good
            await asyncio.sleep(0.2)


async def serve(scheduler: Scheduler, options: ServerOptions | None = None) -> ScoringServer:
    """A server that has started; its port is `server.port`."""
    server = ScoringServer(scheduler, options or ServerOptions())
    await server.start()
    return server
