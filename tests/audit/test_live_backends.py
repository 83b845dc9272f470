"""Live backends under interruptions: a generator that restarts, and a real HTTP server with a completion endpoint."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rollout_wal.audit.adapters.openai import CompletionSource, completion_backend
from rollout_wal.audit.adapters.restart import RestartBackend, Token
from rollout_wal.audit.backends import (
    AuditableBackend,
    Finished,
    Interrupter,
    InterruptKind,
    identical_rollouts,
    run_backend,
)
from rollout_wal.audit.command import audit
from rollout_wal.errors import AuditError
from rollout_wal.params import SamplingParams

SAMPLING = SamplingParams(max_tokens=60)
PROMPTS = [[1, 2, 3], [4, 5], [6]]


def toy(prompt: Sequence[int], sampling: SamplingParams, seed: int) -> Generator[Token]:
    """A language model of one line: uniform lengths, one token every fraction of a millisecond."""
    rng = np.random.default_rng([seed, *prompt])
    length = int(rng.integers(1, sampling.max_tokens + 1))
    for i in range(length):
        time.sleep(0.0002)
        yield Token(int(rng.integers(100)), -1.0, "eos" if i == length - 1 else "")


def test_restarting_loses_work_and_shortens() -> None:
    calm_backend, hit_backend = RestartBackend(toy, slots=4), RestartBackend(toy, slots=4)
    try:
        assert isinstance(hit_backend, AuditableBackend)
        calm = run_backend(calm_backend, PROMPTS, SAMPLING, copies=40, seed=0)
        hit = run_backend(
            hit_backend, PROMPTS, SAMPLING, copies=40, seed=10**6, interrupter=Interrupter(0.008, ("kill", "preempt"))
        )
    finally:
        calm_backend.close()
        hit_backend.close()
    assert calm.table.interruptions_N.sum() == 0
    assert hit.interruptions_made > 5
    assert hit.table.recomputed_N is not None
    assert hit.table.recomputed_N.sum() > 0
    assert len(hit.table) == len(calm.table) == 120
    assert hit.table.length_N.mean() < 0.85 * calm.table.length_N.mean()
    interrupted = hit.table.interruptions_N > 0
    assert hit.table.failure_N is not None
    assert (hit.table.failure_N[interrupted] >= 0).all()
    assert (hit.table.failure_N[~interrupted] == -1).all()


def test_regenerating_from_the_same_seed_gives_the_same_tokens() -> None:
    runs = []
    for interrupter in (None, Interrupter(0.02, seed=1)):
        backend = RestartBackend(toy, slots=4, fresh_noise=False)
        try:
            runs.append(run_backend(backend, PROMPTS, SAMPLING, copies=20, seed=7, interrupter=interrupter))
        finally:
            backend.close()
    assert runs[1].table.interruptions_N.sum() > 0
    assert identical_rollouts(*runs) == (60, 60)


def test_an_error_in_the_source_reaches_the_caller() -> None:
    def broken(prompt: Sequence[int], sampling: SamplingParams, seed: int) -> Generator[Token]:
        yield Token(1)
        raise AuditError("the model is gone")

    backend = RestartBackend(broken, slots=1)
    try:
        with pytest.raises(AuditError, match="the model is gone"):
            run_backend(backend, PROMPTS, SAMPLING, timeout_seconds=10)
    finally:
        backend.close()


class Faulty:
    """Breaks the protocol in the way that it is told to."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.submitted = 0

    def submit(self, prompt_tokens: Sequence[int], sampling: SamplingParams, seed: int) -> int:
        self.submitted += 1
        return 0 if self.fault == "same id" else self.submitted

    def interrupt(self, kind: InterruptKind) -> None: ...

    def collect(self) -> Iterable[Finished]:
        if self.fault == "silence":
            return []
        return [Finished(99 if self.fault == "unknown" else 1, [1], [], "eos", 0)]

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("same id", "same id"),
        ("silence", "not finished within"),
        ("twice", "delivered twice"),
        ("unknown", "without having been submitted"),
    ],
)
def test_broken_protocols_are_named(fault: str, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        run_backend(Faulty(fault), PROMPTS, SAMPLING, timeout_seconds=0.1)


class CompletionHandler(http.server.BaseHTTPRequestHandler):
    """`POST /v1/completions` with server-sent events; uniform lengths, from the seed of the request."""

    protocol_version = "HTTP/1.0"
    style = "token_ids"

    def log_message(self, format: str, *args: object) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != "toy":
            self.send_error(404, "no such model")
            return
        assert body["stream"] is True
        assert self.headers["Authorization"] == "Bearer secret"
        rng = np.random.default_rng([body["seed"], *body["prompt"]])
        length = int(rng.integers(1, body["max_tokens"] + 1))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for _ in range(length):
                time.sleep(0.0003)
                self.chunk(self.token(int(rng.integers(100))) | {"finish_reason": None})
            if self.style != "cut":
                self.chunk({"text": "", "finish_reason": "stop"})
                self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            return  # the client was interrupted: that is the test

    def token(self, token_id: int) -> dict[str, Any]:
        if self.style == "text":
            return {"text": "x "}
        if self.style == "logprobs":
            return {"text": "x ", "logprobs": {"token_logprobs": [-0.5]}}
        return {"text": "x ", "token_ids": [token_id], "logprobs": {"token_logprobs": [-0.5]}}

    def chunk(self, choice: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.flush()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    style = getattr(request, "param", "token_ids")
    handler = type("Handler", (CompletionHandler,), {"style": style})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.mark.parametrize("server", ["token_ids", "logprobs", "text"], indirect=True)
def test_a_completion_server_is_counted_token_by_token(server: str) -> None:
    source = CompletionSource(server, "toy", "secret")
    tokens = list(source([1, 2], SamplingParams(max_tokens=30), seed=3))
    expected = int(np.random.default_rng([3, 1, 2]).integers(1, 31))
    assert len(tokens) == expected
    assert [t.finish_reason for t in tokens] == [""] * (expected - 1) + ["stop"]


def test_a_completion_server_under_interruptions(server: str) -> None:
    backend = completion_backend(CompletionSource(server, "toy", "secret"), slots=4)
    try:
        run = run_backend(
            backend, PROMPTS, SamplingParams(max_tokens=40), copies=10, interrupter=Interrupter(0.03, seed=2)
        )
    finally:
        backend.close()
    assert len(run.table) == 30
    assert run.table.interruptions_N.sum() > 0
    assert (run.table.extras["finish_reason"] == "stop").all()
    np.testing.assert_allclose(run.table.extras["mean_logprob"], -0.5)


@pytest.mark.parametrize("server", ["cut"], indirect=True)
def test_a_stream_that_is_cut_short_is_an_error(server: str) -> None:
    with pytest.raises(AuditError, match="without a finish reason"):
        list(CompletionSource(server, "toy", "secret")([1], SamplingParams(max_tokens=5), 0))


def test_servers_that_cannot_be_used_are_named(server: str) -> None:
    with pytest.raises(AuditError, match="it answered 404"):
        list(CompletionSource(server, "other", "secret")([1], SAMPLING, 0))
    with pytest.raises(AuditError, match="cannot be reached"):
        list(CompletionSource("http://127.0.0.1:1/v1", "toy")([1], SAMPLING, 0))
    with pytest.raises(AuditError, match="no http or https address"):
        list(CompletionSource("ftp://127.0.0.1/v1", "toy")([1], SAMPLING, 0))


def test_the_command_audits_a_server(server: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    arguments = ["run", "completions", "--url", server, "--model", "toy", "--prompts", str(prompts)]
    arguments += ["--copies", "10", "--interrupt-every", "0.02", "--max-tokens", "40", "--api-key", "secret"]
    result = CliRunner().invoke(audit, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    cell = json.loads(result.stdout)["cells"][0]
    assert cell["rollouts"] == 30
    assert cell["predicted_mean"] < cell["reference_mean"]
    prompts.write_text('{"text": "x"}\n', encoding="utf-8")
    result = CliRunner().invoke(audit, arguments)
    assert result.exit_code == 1
    assert "line 1" in result.output
