"""What is done to hosts: stopped in good order, killed, waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import ray


def stop(handle: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(handle.close.remote(), timeout=60)
    ray.kill(handle)


def kill_host(handle: Any) -> int:
    """SIGKILL for the actor's process, as a crash would have it. Returns its id."""
    pid: int = ray.get(handle.pid.remote())
    os.kill(pid, signal.SIGKILL)
    return pid


def wait_until(
    condition: Callable[[], bool], seconds: float = 60.0, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Fails when it takes too long, or when `process`, which should bring it about, has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended before it happened"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
