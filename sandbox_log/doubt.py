"""What to do about a command that was dispatched and has no outcome in the log."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from .errors import TransportLost
from .sandbox import Call, Probe, ProbeState, Sandbox

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class DoubtPolicy:
    """What may be tried, in this order. What is not allowed is skipped; at the end of the list is `InDoubt`.

    Args:
        probe: ask the sandbox by exec id. Collects the result of a command that outlived its client, and
            dispatches one that is proven to have never started.
        rerun_idempotent: dispatch it again if it was declared idempotent.
        rebuild: bring the sandbox back to a snapshot from before the command, run again what came between,
            with outputs compared, and then dispatch the command. What it may have done outside of the
            sandbox is not undone by that. If an output differs, the state is lost.
        wait_s: how long to wait for a command that is still running, on top of its timeout.
    """

    probe: bool = True
    rerun_idempotent: bool = True
    rebuild: bool = True
    wait_s: float = 10.0


async def probe_until_settled(sandbox: Sandbox, call: Call, exec_id: str, policy: DoubtPolicy) -> Probe:
    """Ask what became of a command, and wait while it runs. A sandbox that cannot be reached knows nothing."""
    deadline = time.monotonic() + call.timeout_s + policy.wait_s
    while True:
        try:
            probe = await sandbox.probe(call, exec_id)
        except TransportLost as error:
            probe = Probe(ProbeState.UNKNOWN, detail=str(error))
        if probe.state is not ProbeState.RUNNING or time.monotonic() >= deadline:
            return probe
        await asyncio.sleep(_POLL_S)
