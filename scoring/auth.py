"""Who may call: TLS, mTLS and bearer tokens."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from .errors import BadConfiguration, problem

#: Probes carry no token. They learn whether the server and its teachers work, and nothing else.
_OPEN = "/grpc.health.v1.Health/"


def server_credentials(certificate: Path, private_key: Path, client_authorities: Path | None) -> Any:
    """TLS; with client authorities, only for clients that show a certificate of one of them.

    Raises:
        BadConfiguration: files that cannot be read, are no PEM, or do not belong together.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, private_key, password=_no_password)
        roots = None
        if client_authorities is not None:
            context.load_verify_locations(client_authorities)
            roots = client_authorities.read_bytes()
        pair = (private_key.read_bytes(), certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise BadConfiguration(
            problem(
                f"certificate {certificate}, key {private_key}, client authorities {client_authorities}: {error}",
                consequence="The server did not start",
                remedy="Name PEM files that belong together, the key without a password",
            )
        ) from error
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def _no_password() -> str:
    raise ValueError("the private key has a password")


def read_tokens(path: Path) -> tuple[str, ...]:
    """Bearer tokens of a file, one on a line; empty lines and those that begin with # are not.

    Raises:
        BadConfiguration: it cannot be read, holds none, or one that is too short to be secret.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_tokens(path, str(error)) from error
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise _bad_tokens(path, "it holds no token")
    if any(len(token) < 16 or not token.isascii() or not token.isprintable() for token in tokens):
        raise _bad_tokens(path, "a token has fewer than 16 characters, or others than printable ASCII")
    return tokens


def _bad_tokens(path: Path, what: str) -> BadConfiguration:
    return BadConfiguration(
        problem(
            f"the tokens of {path} cannot be used: {what}",
            consequence="The server did not start",
            remedy="Write one random token on a line, as from `openssl rand -hex 32`",
        )
    )


class BearerTokens(grpc.aio.ServerInterceptor):
    """Refuses calls that do not show one of the tokens, except for health.

    Digests are compared, each of them, so that the time tells neither a token's length nor how much of it was right.

    Args:
        tokens: any of them will do.
        refused: called with every call that is refused.
    """

    def __init__(self, tokens: Sequence[str], refused: Callable[[], None] = lambda: None) -> None:
        self._digests = [hashlib.sha256(f"Bearer {token}".encode()).digest() for token in tokens]
        self._refused = refused

    async def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN):
            return handler
        shown = dict(details.invocation_metadata or ()).get("authorization", "")
        raw = shown if isinstance(shown, bytes) else shown.encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(raw).digest()
        if any([hmac.compare_digest(mine, digest) for mine in self._digests]):  # noqa: C419  each of them, always
            return handler
        self._refused()

        async def refuse(request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid bearer token was shown")

        async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid bearer token was shown")
            yield

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            refuse_stream if handler.response_streaming else refuse,
            handler.request_deserializer,
            handler.response_serializer,
        )
