"""Servers for clients to meet: real ones on loopback, and real ones that have been taught to misbehave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from rollout_wal.testing.tiny_models import make_tiny_model
from scoring.residency import Residency
from scoring.scheduler import Limits, Scheduler
from scoring.server import ScoringServer, ScoringServicer, ServerOptions, serve
from scoring.v1 import scoring_pb2_grpc as pb_grpc


@dataclass
class Host:
    """A server in this process, on the loop of another thread."""

    target: str
    server: ScoringServer
    call: Callable[[Coroutine[Any, Any, Any]], Any]

    def stop(self) -> None:
        self.call(self.server.stop(0))

    def drain(self) -> Any:
        return self.call(self.server.drain(10.0))


@pytest.fixture
def loop_thread() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    yield call
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def host(loop_thread: Any) -> Iterator[Callable[..., Host]]:
    """host(sources, limits=..., **options of the server): one that runs until the test is over."""
    with ExitStack() as stack:

        def start(sources: list[Any], *, limits: Limits | None = None, **options: Any) -> Host:
            sizes = {s.info.id: s.info.nbytes for s in sources}

            async def run() -> ScoringServer:
                scheduler = Scheduler(sources, Residency(sizes, sum(sizes.values())), limits=limits)
                return await serve(scheduler, ServerOptions(**options))

            server = loop_thread(run())
            stack.callback(lambda: loop_thread(server.stop(0)))
            return Host(f"127.0.0.1:{server.port}", server, loop_thread)

        yield start


@pytest.fixture
def front(loop_thread: Any) -> Iterator[Callable[..., str]]:
    """front(host, score): a server that passes items on to `host`'s scheduler, by way of `score(inner, requests,
    context)`, an async generator that may do as it likes with what the real servicer's `inner` gives. Its address.
    """
    with ExitStack() as stack:

        def start(
            behind: Host, score: Callable[[Any, Any, Any], AsyncIterator[Any]] | None = None, **methods: Any
        ) -> str:
            class Servicer(ScoringServicer):
                async def Score(self, requests: Any, context: Any) -> AsyncIterator[Any]:
                    inner = super().Score
                    async for message in score(inner, requests, context) if score else inner(requests, context):
                        yield message

            for name, method in methods.items():
                setattr(Servicer, name, method)

            async def run() -> tuple[Any, int]:
                server = grpc.aio.server()
                pb_grpc.add_TeacherScoringServiceServicer_to_server(Servicer(behind.server.scheduler, 64), server)
                port = server.add_insecure_port("127.0.0.1:0")
                await server.start()
                return server, port

            server, port = loop_thread(run())
            stack.callback(lambda: loop_thread(server.stop(0)))
            return f"127.0.0.1:{port}"

        yield start


@pytest.fixture(scope="session")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Models by seed that share a tokenizer, as a student and its teachers do."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            folder = tmp_path_factory.mktemp("kin") / str(seed)
            # Enough of it that the tokenizer has a token for every logit: what a student samples, a teacher can read.
            words = ["sum", "of", "and", "is", "less", "than", "more", "product", "equals", "so", "then", "because"]
            texts = [
                f"{i} {words[i * j % 12]} {j} = {words[(i + j) % 12]} {i * j}" for i in range(40) for j in range(40)
            ]
            made[seed] = make_tiny_model(folder, seed=seed, max_context=512, mean_length=30, texts=texts)
        return made[seed]

    return make
