"""Tools for a rollout: the structural protocol, answered from the log on resume, and what the model sees."""

from __future__ import annotations

import asyncio
import errno
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sandbox_log.backends.functions import FunctionSandbox
from sandbox_log.backends.local import LocalSandbox
from sandbox_log.errors import LogFenced, LogPoisoned, ReplayMismatch, StateLost
from sandbox_log.events import Kind
from sandbox_log.live import StateChoice
from sandbox_log.log import SandboxLog
from sandbox_log.sandbox import Sandbox
from sandbox_log.tools import SandboxTools, function_tool, shell_tools


@dataclass
class Asked:
    """A tool call as somebody else's parser makes it: nothing of this package is in it."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


def test_a_rollout_uses_its_tools_and_a_resumed_one_does_nothing_twice(ground: Path, log: SandboxLog) -> None:
    async def make(rollout_id: str, _: Any) -> Sandbox:
        return LocalSandbox(ground / rollout_id)

    asked = [
        Asked("write_file", {"path": "a.py", "content": "print('hällo')"}),
        Asked("exec", {"command": "cat a.py; echo x >>count; wc -l <count", "timeout_s": 5}),
        Asked("read_file", {"path": "a.py"}),
        Asked("shell", {"command": "cd /; pwd"}),
        Asked("exec", {"command": "echo bad >&2; exit 3"}),
        Asked("exec", {"command": "head -c 100000 /dev/zero | tr '\\0' z"}),
    ]

    async def rollout(tools: SandboxTools, attempt: int, calls: list[Asked]) -> list[str]:
        results = [
            await tools.call(rollout_id="r1", attempt=attempt, position=10 * n, call=call)
            for n, call in enumerate(calls)
        ]
        return [result.text for result in results]

    async def main() -> None:
        tools = SandboxTools(log, make, shell_tools(), state=StateChoice.REATTACH, observation_bytes_max=1000)
        assert {schema["function"]["name"] for schema in tools.schemas} == {"exec", "shell", "read_file", "write_file"}
        texts = await rollout(tools, 1, asked)
        assert texts[0] == "[no output]"
        assert texts[1] == "print('hällo')1"
        assert texts[2] == "print('hällo')"
        assert texts[3] == "/"
        assert texts[4] == "[stderr]\nbad\n[exit status 3]"
        assert "99000 of 100000 bytes left out" in texts[5]
        await tools.close()
        outcome = [event for event in log.events("r1") if event.kind is Kind.OUTCOME][5]
        assert outcome.body["stdout_bytes"] == 100_000, "the log has all of it"
        # A new process would begin like this.
        again = SandboxTools(log, make, shell_tools(), state=StateChoice.REATTACH, observation_bytes_max=1000)
        assert await rollout(again, 2, asked) == texts
        count = Asked("exec", {"command": "wc -l <count"})
        more = await again.call(rollout_id="r1", attempt=2, position=99, call=count)
        assert more.text == "1"
        with pytest.raises(LogFenced, match="attempt 1 of rollout"):
            await again.call(rollout_id="r1", attempt=1, position=0, call=asked[0])
        # Resumed in the same process: from the log again.
        assert await rollout(again, 3, asked) == texts
        with pytest.raises(ReplayMismatch):
            await again.call(rollout_id="r1", attempt=3, position=98, call=count)
        await again.release("r1")
        await again.release("r1")
        assert (ground / "r1" / "workspace" / "count").read_text() == "x\n"
        intents = [event.body for event in log.events("r1") if event.kind is Kind.INTENT]
        assert [body["position"] for body in intents] == [0, 10, 20, 30, 40, 50, 99]
        assert [body["attempt"] for body in intents] == [1, 1, 1, 1, 1, 1, 2]

    asyncio.run(main())


@pytest.mark.parametrize(
    "call",
    [
        Asked("delete_everything"),
        Asked("exec"),
        Asked("exec", {"command": 3}),
        Asked("exec", {"command": "x", "timeout_s": "soon"}),
        Asked("exec", {"command": "x", "timeout_s": -1}),
        Asked("exec", {"command": "x", "timeout_s": 10**400}),
        Asked("exec", {"command": "nul\0"}),
        Asked("exec", {"command": "\ud800"}),
        Asked("write_file", {"path": "x", "content": "\ud800"}),
        Asked("double", {"n": object()}),
        Asked("double", {"n": 10**30}),
        Asked("double", {"n": functools.reduce(lambda inner, _: [inner], range(2000), [])}),
    ],
)
def test_what_a_model_gets_wrong_is_told_to_it_and_touches_nothing(ground: Path, log: SandboxLog, call: Asked) -> None:
    async def make(rollout_id: str, _: Any) -> Sandbox:
        return LocalSandbox(ground / rollout_id)

    async def main() -> None:
        tools = SandboxTools(log, make, [*shell_tools(), function_tool("double", "twice", {"type": "object"})])
        first = await tools.call(rollout_id="r", attempt=1, position=0, call=call)
        assert not first.ok
        assert first.text.startswith("[")
        assert first == await tools.call(rollout_id="r", attempt=1, position=0, call=call), "the same every time"
        assert all(end.events == 1 for end in log.sandboxes())
        fine = await tools.call(rollout_id="r", attempt=1, position=1, call=Asked("exec", {"command": "echo fine"}))
        assert (fine.ok, fine.text) == (True, "fine"), "nor does it harm what the model asks for next"
        await tools.close()

    asyncio.run(main())


def test_functions_as_tools_and_many_rollouts_at_once(log: SandboxLog) -> None:
    made: list[str] = []

    async def make(rollout_id: str, _: Any) -> Sandbox:
        made.append(rollout_id)
        await asyncio.sleep(0.01)
        return FunctionSandbox({"double": lambda n: 2 * n})

    async def main() -> None:
        tools = SandboxTools(log, make, [function_tool("double", "twice", {"type": "object"}, idempotent=True)])
        calls = [
            tools.call(rollout_id=f"r{n % 20}", attempt=1, position=n, call=Asked("double", {"n": n}))
            for n in range(60)
        ]
        assert [result.text for result in await asyncio.gather(*calls)] == [str(2 * n) for n in range(60)]
        assert sorted(made) == sorted(f"r{n}" for n in range(20)), "one sandbox each, though all began at once"
        await tools.close()
        resumed = SandboxTools(log, make, [function_tool("double", "twice", {"type": "object"}, idempotent=True)])
        first = await resumed.call(rollout_id="r3", attempt=2, position=3, call=Asked("double", {"n": 3}))
        assert first.text == "6"
        for n in (23, 43):
            await resumed.call(rollout_id="r3", attempt=2, position=n, call=Asked("double", {"n": n}))
        with pytest.raises(StateLost, match="nobody said"):
            await resumed.call(rollout_id="r3", attempt=2, position=99, call=Asked("double", {"n": 1}))
        await resumed.close()

    asyncio.run(main())


def test_an_output_that_cannot_be_stored_stops_the_runner_and_not_the_rollout(
    ground: Path, log: SandboxLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def make(rollout_id: str, _: Any) -> Sandbox:
        return LocalSandbox(ground / rollout_id)

    async def main() -> None:
        tools = SandboxTools(log, make, shell_tools(), state=StateChoice.REATTACH)
        large = Asked("exec", {"command": "head -c 100000 /dev/zero"})
        with monkeypatch.context() as patched:
            patched.setattr("sandbox_log.blobs.sync_directory", fail)
            with pytest.raises(LogPoisoned, match="Input/output error") as caught:
                await tools.call(rollout_id="a", attempt=1, position=1, call=large)
        assert caught.value.stops_runner, "nothing is wrong with the rollout"
        for rollout in ("a", "b"):  # the disk is well again, but what it holds nobody knows
            with pytest.raises(LogPoisoned):
                await tools.call(rollout_id=rollout, attempt=1, position=1, call=Asked("exec", {"command": "echo x"}))
        await tools.close()

    asyncio.run(main())
