"""How a client reaches its servers, and how long it tries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import BadConfiguration, problem


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How to reach servers, and how long to try.

    Args:
        token: bearer token to show.
        authorities: PEM file of authorities that servers are checked against; None: no encryption.
        certificate, private_key: PEM files to show to servers (mTLS).
        server_name: the name that servers' certificates carry, where it is not the one they are reached by.
        window: items in flight on a stream. As many answers again may wait for the caller to take them; while they
            do, nothing more is sent.
        streams: streams to each server.
        attempts: how often an item is sent before it is given up: to servers that break off, or answer with what is
            no answer to it.
        patience_s: how long an item waits for a server that has its teacher to be up, or to have room.
        timeout_s: deadline of items that have none of their own, counted from when they are taken on.
        silence_s: a stream on which a server says nothing for so long, though it owes answers, is given up.
        backoff_s, backoff_max_s: delay after the first failure, doubled by each further one; half of it is random.
        other_checkpoints: where no server with the expected checkpoint is up, let one answer whose checkpoint is
            another; such results have `fallback` set.
        result_bytes_max: of one result.
        head_folder: where heads of teachers are kept; None: in memory alone.
    """

    token: str = ""
    authorities: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    server_name: str = ""
    window: int = 128
    streams: int = 1
    attempts: int = 8
    patience_s: float = 300.0
    timeout_s: float | None = None
    silence_s: float = 900.0
    backoff_s: float = 0.1
    backoff_max_s: float = 10.0
    other_checkpoints: bool = False
    result_bytes_max: int = 4 << 30
    head_folder: Path | None = None

    def __post_init__(self) -> None:
        if min(self.window, self.streams, self.attempts) < 1 or self.patience_s < 0 or not self.backoff_s > 0:
            raise BadConfiguration(
                problem(
                    f"{self!r} cannot be used",
                    consequence="No client was made",
                    remedy="window, streams and attempts are at least 1, patience_s at least 0, backoff_s above 0",
                )
            )
