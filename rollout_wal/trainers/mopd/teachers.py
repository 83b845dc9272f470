"""The teachers' configuration and their server: `rollout-wal serve-teachers`, a process of its own."""

from __future__ import annotations

import socket
from pathlib import Path

from .student import PRECISION
from .tasks import DOMAINS


def free_port() -> int:
    """A port that nobody listens on now. The server keeps it over its restarts, so clients find it again."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_config(path: Path, models: Path, port: int, *, token_budget: int) -> Path:
    """teachers.yaml: both specialists, packed in MXFP4, each for its domain."""
    lines = [f"listen: 127.0.0.1:{port}", "memory: 256MiB", "threads: 1", "teachers:"]
    for domain in DOMAINS:
        model = (models / f"{domain}-mxfp4").resolve()
        lines.append(
            f"  {domain}: {{model: {str(model)!r}, precision: {PRECISION}, domains: [{domain}], pinned: true, "
            f"token_budget: {token_budget}, share_prefixes: false}}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path
