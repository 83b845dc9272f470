"""One server as a client sees it: its channel, what it has, and whether it is worth trying."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..errors import BadConfiguration, problem
from ..v1 import scoring_pb2 as pb
from ..v1 import scoring_pb2_grpc as pb_grpc
from .options import ClientOptions
from .retry import delay, is_refusal, of_status, pushback_s

#: A chunk, and room for what describes it.
MESSAGE_BYTES_MAX = 4 << 20
_UNARY_S = 10.0


class Server:
    """One target.

    Health is what calls have found out, and what the server's own health service says: it tells of a server that
    drains before anything is sent to it in vain. A server without that service is judged by its calls alone.
    """

    def __init__(self, target: str, options: ClientOptions) -> None:
        self.target = target
        self.teachers: dict[str, Any] = {}
        """Its `Teacher` messages by id, as it listed them last."""
        self.listed = False
        """It has listed its teachers since the last failure."""
        self.refused = False
        """It does not want us: nothing is sent any more."""
        self.why: Exception | None = None
        """Of the last failure."""
        self.down_since_s: float | None = None
        self.ready_s = 0.0
        self._failures = 0
        self._draining = False
        self._options = options
        self._channel = _channel(target, options)
        self._stub: Any = pb_grpc.TeacherScoringServiceStub(self._channel)  # type: ignore[no-untyped-call]

    @property
    def up(self) -> bool:
        return self.listed and not self._draining and not self.refused

    async def list_teachers(self) -> None:
        """Ask what it has. Raises AioRpcError, after having taken note of the failure."""
        try:
            answer = await self._stub.ListTeachers(pb.ListTeachersRequest(), metadata=self.metadata(), timeout=_UNARY_S)
        except grpc.aio.AioRpcError as error:
            self.failed(error)
            raise
        self.teachers = {teacher.provenance.teacher: teacher for teacher in answer.teachers}
        self.listed = True
        self._failures, self.down_since_s = 0, None

    def failed(self, error: Exception | None) -> None:
        """A call broke off: leave the server alone for a while, longer each time."""
        now = asyncio.get_running_loop().time()
        self._failures += 1
        self.why, self.listed = error or of_status(self.target, None), False
        if self.down_since_s is None:
            self.down_since_s = now
        asked = 0.0
        if isinstance(error, grpc.aio.AioRpcError):
            self.refused, asked = is_refusal(error), pushback_s(error)
        self.pause(max(asked, delay(self._options, self._failures)))

    def pause(self, seconds: float) -> None:
        """Send it nothing for so long."""
        self.ready_s = max(self.ready_s, asyncio.get_running_loop().time() + seconds)

    def score(self, requests: Any) -> Any:
        return self._stub.Score(requests, metadata=self.metadata())  # without a deadline: each item has its own

    def head(self, request: pb.GetTeacherHeadRequest) -> Any:
        return self._stub.GetTeacherHead(request, metadata=self.metadata(), timeout=self._options.silence_s)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follow the health service for as long as this runs; `changed` is called when something did."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        failures = 0
        while not self.refused:
            try:
                call = stub.Watch(health_pb2.HealthCheckRequest(service=""), metadata=self.metadata())
                async for answer in call:
                    failures = 0
                    draining = answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
                    if draining != self._draining:
                        self._draining = draining
                        if draining and self.down_since_s is None:
                            self.down_since_s = asyncio.get_running_loop().time()
                        elif not draining:
                            self.listed = False  # another process may be serving now: ask what it has
                        changed()
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
                    return
            if self._draining:  # its process has gone; what comes back is to be asked anew
                self._draining, self.listed = False, False
                changed()
            failures += 1
            await asyncio.sleep(delay(self._options, failures))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._options.token}"),) if self._options.token else ()

    async def close(self) -> None:
        await self._channel.close()


def _channel(target: str, options: ClientOptions) -> Any:
    settings: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.enable_retries", 0),  # items are sent again, whole; gRPC must not do so behind our back
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if options.authorities is None:
        return grpc.aio.insecure_channel(target, options=settings)
    if options.server_name:
        settings.append(("grpc.ssl_target_name_override", options.server_name))
    own = [_pem(path) if path else None for path in (options.private_key, options.certificate)]
    credentials = grpc.ssl_channel_credentials(_pem(options.authorities), *own)
    return grpc.aio.secure_channel(target, credentials, options=settings)


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadConfiguration(
            problem(f"{path} cannot be read: {error}", consequence="No server was called", remedy="Name a PEM file")
        ) from error
