"""Tools in memory, and a parser that a tiny model can talk to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_wal.episode import ToolCall, ToolResult
from rollout_wal.params import SamplingParams

SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True)
ENDS = tuple(range(64, 90))


class Parser:
    """Each of some tokens, or a string, ends a call. Tests change how it reads and what it says."""

    name = "test/1"

    def __init__(self, stop: tuple[str, ...] = (), ends: tuple[int, ...] = ENDS) -> None:
        self.stop = stop
        self.stop_token_ids = ends
        self.reads: Callable[[NDArray[np.int32]], Sequence[ToolCall]] = lambda token_T: [
            ToolCall("add", {"n": len(token_T)}, span=(len(token_T) - 1, len(token_T)))
        ]
        self.says: Callable[[str], Sequence[int]] = lambda text: [100 + b for b in text.encode()]

    def calls(self, token_T: NDArray[np.int32]) -> Sequence[ToolCall]:
        return self.reads(token_T)

    def observe(self, results: Sequence[ToolResult]) -> NDArray[np.int32]:
        return np.asarray(self.says("".join(r.text for r in results)), np.int32)


@dataclass
class Result:
    text: str
    ok: bool = True


@dataclass
class Memory:
    """Tools that remember what they did, as a log would, and fail where they are told to."""

    fail: Callable[[int], None] = lambda _: None
    done: dict[tuple[str, int, int], str] = field(default_factory=dict)
    ran: list[tuple[str, int, int]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    attempts: set[int] = field(default_factory=set)
    released: list[str] = field(default_factory=list)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def call(
        self, *, rollout_id: str, attempt: int, position: int, call: ToolCall, metadata: Mapping[str, Any]
    ) -> Result:
        self.metadata[rollout_id] = dict(metadata)
        self.attempts.add(attempt)
        key = rollout_id, position, int(call.arguments["n"])
        if key not in self.done:
            self.fail(len(self.ran))
            self.ran.append(key)
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            try:
                await self.work()
            finally:  # cancelled, nobody waits for it any more; it is done, and remembered, all the same
                self.busy -= 1
                self.done[key] = f"{call.arguments['n']} at {position}"
        return Result(self.done[key])

    async def work(self) -> None:
        await asyncio.sleep(0.01)

    async def release(self, rollout_id: str) -> None:
        self.released.append(rollout_id)
