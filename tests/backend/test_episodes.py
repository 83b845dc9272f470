"""Episodes over tools in memory: where turns end, what is censored, what stops the backend, what is refused."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from rollout_wal.backend import RolloutBackend
from rollout_wal.engines.base import FinishReason
from rollout_wal.episode import BadToolCall, Episodes, ToolCall
from rollout_wal.errors import BackendError, BadInput
from rollout_wal.tool_calls import TaggedToolCalls

sys.path.insert(0, str(Path(__file__).parent))
from episode_tools import ENDS, SAMPLING, Memory, Parser, Result


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
        assert any(r.finish_reason is FinishReason.TURN_LIMIT and r.turns == 1 for r in got.values())
        assert all(r.finish_reason in (FinishReason.TURN_LIMIT, FinishReason.MAX_TOKENS) for r in got.values())
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
    both = ids(f"first {tagged} then {tagged}")
    found = parser.calls(both)
    assert found == [ToolCall("exec", {"command": "ls"})] * 2
    for one in found:
        assert one.span is not None
        said = tokenizer.decode(both[slice(*one.span)].tolist(), skip_special_tokens=False)
        assert tagged in said
        assert len(said) < len(tagged) + 8, "the tokens of the call, and what shares a token with it"
    for bad in ("</tool_call>", "<tool_call>{}</tool_call>", "<tool_call>[1", '<tool_call>{"name": 1}</tool_call>'):
        with pytest.raises(BadToolCall):
            parser.calls(ids(bad))
    observed = parser.observe([Result("one <eos> two")])
    assert tokenizer.token_to_id("<eos>") not in observed.tolist(), "what a tool says ends no turn"
    assert "one <eos> two" in tokenizer.decode(observed.tolist(), skip_special_tokens=False)
    assert parser.name == TaggedToolCalls(model).name != TaggedToolCalls(model, before="x").name
