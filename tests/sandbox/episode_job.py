"""Episodes of a tiny model in a process of its own, to be killed; and what its tests share with it.

    python episode_job.py CONFIG

CONFIG is a JSON object: `model`, `ground` (where everything lies), `sandbox` ("local" or "bubblewrap"), and how it is
to die: `die_at` (a point, see `arm`), at its `die_nth` occurrence. Each finished rollout is a line of JSON on `out`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_wal.backend import RolloutBackend
from rollout_wal.backend.coordinator import Coordinator
from rollout_wal.backend.turns import Turns
from rollout_wal.episode import BadToolCall, Episodes, ToolCall, ToolResult
from rollout_wal.params import SamplingParams
from rollout_wal.wal import RolloutWal
from sandbox_log.backends.bubblewrap import BubblewrapSandbox, Limits
from sandbox_log.backends.local import LocalSandbox
from sandbox_log.live import StateChoice
from sandbox_log.log import SandboxLog
from sandbox_log.sandbox import Sandbox
from sandbox_log.tools import SandboxTools, shell_tools

#: A tiny model says each of these every few dozen tokens. What it says before decides what the command writes.
CALL_ENDS = tuple(range(64, 80))
BAD_CALL = 322
SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True)
PROMPTS = [[1, 40 + i, 50 + 2 * i] for i in range(3)]
COUNT = "echo x >>count-{0}; echo {1} >>history; sleep 0.1; wc -l <history; cat count-{0}"


class CountingParser:
    """A call ends with one of some tokens, and counts in a file that only it counts in."""

    name = "counting/1"
    stop_token_ids = (*CALL_ENDS, BAD_CALL)
    stop: tuple[str, ...] = ()

    def calls(self, token_T: NDArray[np.int32]) -> Sequence[ToolCall]:
        if not len(token_T) or int(token_T[-1]) not in self.stop_token_ids:
            return ()
        if int(token_T[-1]) == BAD_CALL:
            raise BadToolCall("[that is no call]")
        name = "-".join(str(t) for t in token_T[-4:].tolist())
        return [ToolCall("exec", {"command": COUNT.format(name, len(token_T))})]

    def observe(self, results: Sequence[ToolResult]) -> NDArray[np.int32]:
        text = "".join(result.text for result in results)
        return np.asarray([100 + b for b in text.encode()], np.int32)


def make_tools(ground: Path, kind: str, log: SandboxLog) -> SandboxTools:
    async def make(rollout_id: str, _: Any) -> Sandbox:
        where = ground / f"sandbox-{rollout_id.rpartition('-')[2]}"
        if kind == "local":
            return LocalSandbox(where)
        return BubblewrapSandbox(where, limits=Limits(memory_bytes=256 << 20, processes=64))

    return SandboxTools(log, make, shell_tools(), state=StateChoice.REATTACH)


def arm(point: str, nth: int, hit: Any) -> Any:
    """Have `hit(backend's coordinator or None)` called once at the nth occurrence of a point of the dance. Returns the
    hook for the points inside the sandbox log.

    before_durable   a worker has sampled the end of a call; this process has not heard of it
    before_dispatch  it is durable and read as a call; no tool has heard of it
    intent_pending, intent_durable, before_outcome, outcome_pending, outcome_durable   see `sandbox_log.faults`
    before_observe   the outcome is durable; nothing of it is in the job log
    observe_pending  the Observe is appended, and may not be durable
    observed         the Observe is durable; no attempt has gone on behind it

    In the middle of a command ("during_command"): see `interrupt`.
    """
    seen = [0]

    def at(here: str, *more: Any) -> None:
        if here == point:
            seen[0] += 1
            if seen[0] == nth:
                hit(*more)

    frames, take, observe = Coordinator._frames, Turns.take, RolloutWal.observe

    def _frames(self: Coordinator, worker: Any, message: Any) -> None:
        if point == "before_durable" and any(
            kind == 3 and _ends_call(payload) for kind, _, _, payload in message["frames"]
        ):
            at("before_durable")
        frames(self, worker, message)

    def taken(self: Turns, *args: Any) -> Any:
        at("before_dispatch")
        return take(self, *args)

    def observing(self: RolloutWal, *args: Any, **kwargs: Any) -> int:
        at("before_observe")
        lsn = observe(self, *args, **kwargs)
        at("observe_pending")
        if point == "observed":
            self.wait_durable(lsn)
            at("observed")
        return lsn

    Coordinator._frames = _frames  # type: ignore[method-assign]
    Turns.take = taken  # type: ignore[method-assign]
    RolloutWal.observe = observing  # type: ignore[method-assign]
    return at


def interrupt(tools: SandboxTools, nth: int, hit: Callable[[], None]) -> None:
    """Have `hit` called while the nth command sleeps."""
    call, seen = tools.call, [0]

    async def called(**given: Any) -> Any:
        seen[0] += 1
        if seen[0] == nth:
            asyncio.get_running_loop().call_later(0.08, hit)
        return await call(**given)

    tools.call = called  # type: ignore[method-assign]


def _ends_call(payload: bytes) -> bool:
    from rollout_wal.step import decode_step

    return bool(np.isin(decode_step(payload).token_N, CALL_ENDS).any())


def main(config: dict[str, Any]) -> None:
    ground = Path(config["ground"])

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    at = arm(config.get("die_at", ""), config.get("die_nth", 1), die)
    with open(config["out"], "a", buffering=1) as out, SandboxLog(ground / "log", faults=at) as log:
        tools = make_tools(ground, config["sandbox"], log)
        if config.get("die_at") == "during_command":
            interrupt(tools, config["die_nth"], die)
        episodes = Episodes(tools, CountingParser())
        with RolloutBackend(
            config["model"], ground / "wal", workers=1, slots=8, segment_bytes=1 << 18, episodes=episodes
        ) as backend:
            for r in backend.generate(PROMPTS, SAMPLING, group_size=2, cohort="job"):
                out.write(
                    json.dumps(
                        {
                            "index": r.index,
                            "id": r.id,
                            "tokens": r.tokens.tolist(),
                            "sampled": r.output.sampled_T.tolist(),
                            "reason": r.finish_reason.name,
                            "censored": r.censored,
                            "turns": r.turns,
                        }
                    )
                    + "\n"
                )
            out.write(json.dumps({"done": backend.balance().holds, "calls": backend.stats.tool_calls}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
