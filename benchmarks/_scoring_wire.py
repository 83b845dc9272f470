"""Results over loopback: raw arrays in protobuf over gRPC, lists in JSON over HTTP, base64 in JSON over HTTP.

Of each, what both ends spend: from the server's arrays to the client's, connection kept open, one sequence of 1,024
positions at a time. The three take turns.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np

from rollout_wal.dataset import Provenance
from scoring import wire
from scoring.items import Scores
from scoring.v1 import scoring_pb2 as pb
from scoring.v1 import scoring_pb2_grpc as pb_grpc

ROWS = 1024
PAYLOADS = {"logprobs": 0, "top8": 8, "top64": 64, "hidden2048": -2048}
_FIELDS = ("logprobs", "top_ids", "top_logprobs", "tail_mass", "hidden_states")


def make_scores(payload: str) -> Scores:
    rng = np.random.default_rng(0)
    k = max(PAYLOADS[payload], 0)
    numbers = lambda *shape: -rng.exponential(size=shape).astype(np.float32)  # noqa: E731
    return Scores(
        (1, ROWS + 1),
        Provenance("math", "c" * 32, "d" * 32, "e" * 32, "bfloat16"),
        1,
        2,
        "f" * 40,
        np.ones(ROWS, bool),
        numbers(ROWS),
        rng.integers(0, 100_000, (ROWS, k)).astype(np.int32) if k else None,
        numbers(ROWS, k) if k else None,
        numbers(ROWS) if k else None,
        hidden_states=None if k or payload == "logprobs" else rng.integers(0, 30_000, (ROWS, 2048)).astype(np.uint16),
    )


def to_lists(scores: Scores) -> bytes:
    return json.dumps({n: getattr(scores, n).tolist() for n in _FIELDS if getattr(scores, n) is not None}).encode()


def from_lists(raw: bytes) -> Any:
    kinds = {"top_ids": np.int32, "hidden_states": np.uint16}
    return {n: np.asarray(v, kinds.get(n, np.float32)) for n, v in json.loads(raw).items()}


def to_base64(scores: Scores) -> bytes:
    found = {n: getattr(scores, n) for n in _FIELDS if getattr(scores, n) is not None}
    return json.dumps(
        {n: [a.dtype.str, a.shape, base64.b64encode(a.tobytes()).decode()] for n, a in found.items()}
    ).encode()


def from_base64(raw: bytes) -> Any:
    return {
        n: np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
        for n, (dtype, shape, data) in json.loads(raw).items()
    }


class _Servicer(pb_grpc.TeacherScoringServiceServicer):
    """Answers every item with the same scores, encoded anew."""

    def __init__(self) -> None:
        self.scores: Scores | None = None

    async def Score(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            assert self.scores is not None
            for message in wire.result_messages(request.item_id, self.scores):
                yield message


def _http(encode: Callable[[], bytes]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
        wbufsize = -1

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def measure_wire(positions: int, repeats: int) -> dict[str, Any]:
    """Microseconds per position, medians, by payload."""
    return asyncio.run(_measure(positions // ROWS, repeats))


async def _measure(count: int, repeats: int) -> dict[str, Any]:
    servicer, order = _Servicer(), random.Random(0)
    server = grpc.aio.server()
    pb_grpc.add_TeacherScoringServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    out: dict[str, Any] = {}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = pb_grpc.TeacherScoringServiceStub(channel)
        for payload, k in PAYLOADS.items():
            scores = servicer.scores = make_scores(payload)
            https = {
                "json": (_http(lambda scores=scores: to_lists(scores)), from_lists),
                "base64": (_http(lambda scores=scores: to_base64(scores)), from_base64),
            }
            many = count if k >= 0 else max(1, count // 8)  # lists of hidden states take for ever
            took: dict[str, list[float]] = {"ours": [], "json": [], "base64": []}
            for _ in range(repeats):
                for which in order.sample(list(took), 3):
                    started = time.perf_counter()
                    if which == "ours":
                        await _ours(stub, many)
                    else:
                        http_server, decode = https[which]
                        await asyncio.to_thread(_post, http_server.server_port, decode, many)
                    took[which].append((time.perf_counter() - started) / (many * ROWS) * 1e6)
            for http_server, _ in https.values():
                http_server.shutdown()
                http_server.server_close()
            size = sum(m.ByteSize() for m in wire.result_messages("0", scores))
            out[payload] = {f"{which}_us": statistics.median(values) for which, values in took.items()}
            out[payload] |= {
                "ours_bytes": size / ROWS,
                "json_bytes": len(to_lists(scores)) / ROWS,
                "base64_bytes": len(to_base64(scores)) / ROWS,
            }
    await server.stop(0)
    return out


async def _ours(stub: Any, count: int) -> None:
    call = stub.Score()
    for i in range(count):
        await call.write(pb.ScoreRequest(item_id=str(i), last=True))
        header, assembler = None, wire.result_assembler(1 << 30)
        while True:
            message = await call.read()
            header = message.result if message.HasField("result") else header
            assembler.add(message.chunks)
            if message.last:
                break
        assert header is not None
        wire.read_result(header, assembler)
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass


def _post(port: int, decode: Callable[[bytes], Any], count: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for i in range(count):
        connection.request("POST", "/score", json.dumps({"id": i}))
        decode(connection.getresponse().read())
    connection.close()
