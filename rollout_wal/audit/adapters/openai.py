"""Any server with an OpenAI-compatible completion endpoint, audited over HTTP.

The stream is read token by token; an interruption drops the connection, as a dead server would, and the prompt is sent
again. The server never sees a prefix: this is the loop that most rollout code has.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import AuditError, problem
from ...params import SamplingParams
from .restart import RestartBackend, Token


@dataclass(frozen=True, slots=True)
class CompletionSource:
    """Streams one completion of `POST {base_url}/completions`. Plain http or https; no client library is needed.

    Args:
        base_url: up to and including the version, as in http://127.0.0.1:8000/v1.
        model: as the server names it.
        api_key: sent as a bearer token, if given.
        timeout_seconds: without a byte from the server.

    Token ids are those of the server's `token_ids` extension where it sends them (`return_token_ids`); else one
    zero stands for each token of the stream, counted by its logprobs, or one per chunk if there are none.
    """

    base_url: str
    model: str
    api_key: str | None = None
    timeout_seconds: float = 120.0

    def __call__(self, prompt: Sequence[int], sampling: SamplingParams, seed: int) -> Generator[Token]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": seed,
            "logprobs": 1,
            "stream": True,
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = self.base_url.rstrip("/") + "/completions"
        if not url.startswith(("http://", "https://")):
            raise self._failed(
                url, "it is no http or https address", "Give a base URL such as http://127.0.0.1:8000/v1"
            )
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                yield from self._tokens(response, url)
        except urllib.error.HTTPError as error:
            detail = error.read(500).decode("utf-8", "replace")
            error.close()
            raise self._failed(
                url, f"it answered {error.code}: {detail}", "Check the model's name and the key"
            ) from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise self._failed(url, f"it cannot be reached: {error}", "Check that the server runs") from error

    def _tokens(self, response: Any, url: str) -> Iterator[Token]:
        reason, held = "", None
        for raw in response:
            line = raw.decode("utf-8").strip()
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                break
            try:
                choice = json.loads(data)["choices"][0]
            except (ValueError, LookupError, TypeError) as error:
                remedy = "Check that it speaks the completions API"
                raise self._failed(url, f"it sent a chunk that is no completion: {data[:200]}", remedy) from error
            reason = choice.get("finish_reason") or reason
            # One token is held back: the finish reason may come in a later chunk that holds none.
            for token in _chunk_tokens(choice):
                if held is not None:
                    yield held
                held = token
        if not reason:
            raise self._failed(url, "the stream ended without a finish reason", "Check the server's log")
        if held is not None:
            yield replace(held, finish_reason=reason)

    @staticmethod
    def _failed(url: str, what: str, remedy: str) -> AuditError:
        return AuditError(problem(f"{url}: {what}", consequence="The backend was not audited", remedy=remedy))


def _chunk_tokens(choice: dict[str, Any]) -> Iterator[Token]:
    """The tokens of one chunk; a closing chunk may hold none."""
    ids = choice.get("token_ids")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if ids is None:
        count = len(logprobs) if logprobs else int(bool(choice.get("text")))
        ids = [0] * count
    known = list(logprobs) if logprobs and len(logprobs) == len(ids) else [None] * len(ids)
    for token_id, logprob in zip(ids, known):
        yield Token(int(token_id), logprob)


def completion_backend(source: CompletionSource, *, slots: int = 8, fresh_noise: bool = True) -> RestartBackend:
    """The audit's backend around such a server: restart from scratch on every interruption."""
    return RestartBackend(source, slots=slots, fresh_noise=fresh_noise)
