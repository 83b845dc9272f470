"""Episodes over tools in memory: where turns end, what is censored, what stops the backend, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from rollout_wal.backend import RolloutBackend
from rollout_wal.episode import BadToolCall, Episodes, ToolCall, ToolResult
from rollout_wal.errors import BackendError, BadInput
from rollout_wal.params import SamplingParams
from rollout_wal.tool_calls import TaggedToolCalls

SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True)
ENDS = tuple(range(64, 90))


class Parser:
    """Each of some tokens, or a string, ends a call."""

    name = "test/1"

    def __init__(self, stop: tuple[str, ...] = (), ends: tuple[int, ...] = ENDS) -> None:
        self.stop = stop
        self.stop_token_ids = ends

    def calls(self, token_T: NDArray[np.int32]) -> Sequence[ToolCall]:
        return [ToolCall("add", {"n": len(token_T)})]

    def observe(self, results: Sequence[ToolResult]) -> NDArray[np.int32]:
        return np.asarray([100 + b for b in "".join(r.text for r in results).encode()], np.int32)


@dataclass
class Result:
    text: str
    ok: bool = True


@dataclass
class Memory:
    """Tools that remember what they did, as a log would, and fail where they are told to."""

    fail: Callable[[int], None] = lambda _: None
    done: dict[tuple[str, int], str] = field(default_factory=dict)
    ran: list[tuple[str, int]] = field(default_factory=list)
    attempts: set[int] = field(default_factory=set)
    released: list[str] = field(default_factory=list)

    async def call(self, *, rollout_id: str, attempt: int, position: int, call: ToolCall) -> Result:
        self.attempts.add(attempt)
        if (rollout_id, position) not in self.done:
            self.fail(len(self.ran))
            self.ran.append((rollout_id, position))
            await asyncio.sleep(0.01)
            self.done[rollout_id, position] = f"{call.arguments['n']} at {position}"
        return Result(self.done[rollout_id, position])

    async def release(self, rollout_id: str) -> None:
        self.released.append(rollout_id)


class Gone(Exception):
    censor_reason: ClassVar = "gone"


class Broken(Exception):
    stops_runner: ClassVar = True


Make = Callable[..., RolloutBackend]


def generate(backend: RolloutBackend, prompts: Any, **more: Any) -> dict[int, Any]:
    return {r.index: r for r in backend.generate(prompts[:4], SAMPLING, cohort="c", **more)}


def test_a_tool_that_raises_censors_its_rollout_alone(backend: Make, prompts: Any) -> None:
    failed: list[int] = []

    class Failing(Memory):
        async def call(self, **given: Any) -> Result:
            if len(failed) < 2:
                failed.append(1)
                raise Gone if len(failed) == 1 else ValueError("no")
            return await super().call(**given)

    with backend(workers=1, episodes=Episodes(Failing(), Parser())) as b:
        got = generate(b, prompts)
        assert b.balance().holds
        assert dict(b.balance().censored) == {"gone": 1, "tool-failed: ValueError": 1}
    for r in got.values():
        assert r.censored is None or int(r.tokens[-1]) in ENDS


def test_tools_that_cannot_go_on_stop_the_backend_and_lose_nothing(backend: Make, prompts: Any) -> None:
    def fail(n: int) -> None:
        if n == 3:
            raise Broken("the disk")

    tools = Memory(fail)
    with (
        pytest.raises(BackendError, match="Broken: the disk"),
        backend(workers=1, episodes=Episodes(tools, Parser())) as b,
    ):
        generate(b, prompts)
    tools.fail = lambda _: None
    with backend(workers=1, episodes=Episodes(tools, Parser())) as b:
        got = generate(b, prompts)
        assert b.balance().holds
    assert all(r.censored is None for r in got.values())
    assert len(tools.ran) == len(set(tools.ran))
    assert len(tools.attempts) == 2, "a later owner says so"


def test_limits_aborts_and_others(backend: Make, prompts: Any, until: Any) -> None:
    tools = Memory()
    with backend(workers=1, episodes=Episodes(tools, Parser(), turns_max=1)) as b:
        got = generate(b, prompts)
        assert all(r.turns <= 1 for r in got.values())
        assert any(r.finish_reason.name == "STOP_TOKEN" and r.turns == 1 for r in got.values())
        assert sorted(tools.released) == sorted(r.episode for r in got.values() if r.turns), "before they came out"

    class Hanging(Memory):
        async def call(self, **given: Any) -> Result:
            await asyncio.sleep(600)
            raise AssertionError

    hanging = Hanging()
    with backend(workers=1, episodes=Episodes(hanging, Parser(), turns_max=1), grace_s=1.0) as b:
        iterator = b.generate(prompts[:4], SAMPLING, cohort="d")
        until(lambda: b.stats.calling + b.stats.finished == 4, 30)
        calling = b.in_flight("d")
        assert calling
        for rollout in calling:
            b.abort(rollout)
        for r in iterator:
            assert (r.censored == "abort") == (r.id in calling)
            assert r.censored is None or int(r.tokens[-1]) in ENDS
        b.generate(prompts[:4], SAMPLING, cohort="e")
        until(lambda: b.stats.calling > 0, 30)
    with pytest.raises(BadInput, match="is in flight with turns"):
        backend(workers=1).start()
    with pytest.raises(BadInput, match="is in flight with turns"):
        backend(workers=1, episodes=Episodes(tools, Parser(ends=(1,)))).start()


def test_the_tagged_parser(model: Path) -> None:
    parser = TaggedToolCalls(model)
    tokenizer = parser._tokenizer

    def ids(text: str) -> NDArray[np.int32]:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    call = json.dumps({"name": "exec", "arguments": {"command": "ls"}})
    assert parser.calls(ids("that is all")) == []
    tagged = f"<tool_call>{call}</tool_call>"
    assert parser.calls(ids(f"first {tagged} then {tagged}")) == [ToolCall("exec", {"command": "ls"})] * 2
    for bad in ("</tool_call>", "<tool_call>{}</tool_call>", "<tool_call>[1", '<tool_call>{"name": 1}</tool_call>'):
        with pytest.raises(BadToolCall):
            parser.calls(ids(bad))
    observed = parser.observe([Result("one <eos> two")])
    assert tokenizer.token_to_id("<eos>") not in observed.tolist(), "what a tool says ends no turn"
    assert "one <eos> two" in tokenizer.decode(observed.tolist(), skip_special_tokens=False)
    assert parser.name == TaggedToolCalls(model).name != TaggedToolCalls(model, before="x").name
