"""Tools for a rollout: what a model asks for, done in a sandbox and logged.

A runner of tool-calling rollouts needs to know no more of this package than a structural protocol. It is:

    class Tools(Protocol):
        async def call(
            self, *, rollout_id: str, attempt: int, position: int, call: ToolCall, metadata: Mapping[str, Any]
        ) -> ToolResult: ...
        async def release(self, rollout_id: str) -> None: ...

- `call` is awaited only once the tokens up to `position`, the last token of the request, are durable in the
  rollout's own log. When it returns, the outcome is durable here: the observation may be logged and shown.
- When the runner itself is a new one, it repeats a rollout's calls in order, with the same positions and a higher
  `attempt`; those that are in the log are answered from it. Within one runner's life `attempt` stays the same.
- What a model gets wrong (an unknown tool, bad arguments) is a result with `ok` false, and the same every time. It
  touches no sandbox and is not logged.
- `InDoubt` and the other errors of this package are for the runner: the rollout cannot go on from here. Nothing was
  guessed.
- `release` says that the rollout is over, or that this runner makes no more calls for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from .doubt import DoubtPolicy
from .errors import BadCall, LogFenced, problem
from .live import StateChoice
from .log import SandboxLog
from .replay import LoggedSandbox
from .sandbox import Call, Operation, Result, Sandbox
from .steps import Cause
from .view import observation

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ToolCall(Protocol):
    """What a model asked for, as its tool-call parser understood it."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model is told.

    Args:
        text: the observation. Large output is cut here and nowhere else.
        ok: the tool did what it was asked.
        result: all of it; None if no sandbox was touched.
    """

    text: str
    ok: bool
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool as the model sees it.

    Args:
        name, description, parameters: for the chat template; parameters are a JSON schema of an object.
        make: turns the model's arguments into a call; KeyError, TypeError, ValueError and OverflowError mean bad
            arguments.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    make: Callable[[Mapping[str, Any]], Call]

    @property
    def schema(self) -> dict[str, Any]:
        """In the form that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def shell_tools(*, timeout_s: float = 120.0, timeout_s_max: float = 600.0) -> list[Tool]:
    """The usual four: run a command, run one in a persistent shell, read a file, write a file."""

    def seconds(arguments: Mapping[str, Any]) -> float:
        return min(float(arguments.get("timeout_s", timeout_s)), timeout_s_max)

    def make_exec(arguments: Mapping[str, Any]) -> Call:
        return Call(Operation.EXEC, {"command": _text(arguments, "command")}, timeout_s=seconds(arguments))

    def make_shell(arguments: Mapping[str, Any]) -> Call:
        command = {"session": "main", "command": _text(arguments, "command")}
        return Call(Operation.SHELL, command, timeout_s=seconds(arguments))

    def make_read(arguments: Mapping[str, Any]) -> Call:
        return Call(Operation.READ_FILE, {"path": _text(arguments, "path")}, timeout_s=timeout_s, idempotent=True)

    def make_write(arguments: Mapping[str, Any]) -> Call:
        path, content = _text(arguments, "path"), _text(arguments, "content")
        return Call(Operation.WRITE_FILE, {"path": path}, content.encode(), timeout_s=timeout_s, idempotent=True)

    command = {"command": {"type": "string"}, "timeout_s": {"type": "number"}}
    path, content = {"path": {"type": "string"}}, {"content": {"type": "string"}}
    return [
        Tool("exec", "Run a shell command.", _object(command, "command"), make_exec),
        Tool("shell", "Run a command in a shell that stays open.", _object(command, "command"), make_shell),
        Tool("read_file", "Read a file.", _object(path, "path"), make_read),
        Tool("write_file", "Write a file.", _object({**path, **content}, "path", "content"), make_write),
    ]


def function_tool(name: str, description: str, parameters: Mapping[str, Any], *, idempotent: bool = False) -> Tool:
    """A tool that is a function of a `FunctionSandbox`."""

    def make(arguments: Mapping[str, Any]) -> Call:
        return Call(Operation.CALL, {"name": name, "arguments": dict(arguments)}, idempotent=idempotent)

    return Tool(name, description, parameters, make)


class SandboxTools:
    """Implements `Tools` with one logged sandbox for each rollout, under the rollout's own id.

    Args:
        log: open for writing.
        make_sandbox: makes, or reattaches to, the sandbox of a rollout, given its id and its metadata.
        tools: what the model may use.
        state: how a resumed rollout's sandbox has the state that its log speaks of; see `StateChoice`.
        policy: what to do about a call in doubt.
        observation_bytes_max: of each output stream, in what the model sees.
    """

    def __init__(
        self,
        log: SandboxLog,
        make_sandbox: Callable[[str, Mapping[str, Any]], Awaitable[Sandbox]],
        tools: list[Tool],
        *,
        state: StateChoice | None = None,
        policy: DoubtPolicy | None = None,
        observation_bytes_max: int = 16 << 10,
    ) -> None:
        self._log = log
        self._make_sandbox = make_sandbox
        self._tools = {tool.name: tool for tool in tools}
        self._state = state
        self._policy = policy
        self._observation_bytes_max = observation_bytes_max
        self._open: dict[str, tuple[int, LoggedSandbox]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools, in the form that chat templates take."""
        return [tool.schema for tool in self._tools.values()]

    async def call(
        self, *, rollout_id: str, attempt: int, position: int, call: ToolCall, metadata: Mapping[str, Any] = _NOTHING
    ) -> ToolResult:
        """Do what a model asked for, once. Durable when it returns; see the top of this file.

        Raises:
            SandboxError: InDoubt, ReplayMismatch, StateLost, LogFenced, LogPoisoned...: the rollout cannot
                go on from here.
        """
        tool = self._tools.get(call.name)
        if tool is None:
            return ToolResult(f"[there is no tool {call.name!r}; there are {', '.join(self._tools)}]", ok=False)
        try:
            request = tool.make(call.arguments)
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # float() of a very long integer
            return ToolResult(f"[bad arguments for {call.name}: {error}]", ok=False)
        sandbox = await self._sandbox(rollout_id, attempt, metadata)
        try:
            result = await sandbox.run(request, Cause(rollout_id, position, attempt))
        except BadCall as error:
            return ToolResult(f"[bad arguments for {call.name}: {error}]", ok=False)
        return ToolResult(observation(result, self._observation_bytes_max), ok=result.ok, result=result)

    async def release(self, rollout_id: str) -> None:
        """The rollout is over: close its sandbox. Its log stays."""
        self._locks.pop(rollout_id, None)
        if rollout_id in self._open:
            await self._open.pop(rollout_id)[1].close()

    async def close(self) -> None:
        """Release everything."""
        for rollout_id in list(self._open):
            await self.release(rollout_id)

    async def _sandbox(self, rollout_id: str, attempt: int, metadata: Mapping[str, Any]) -> LoggedSandbox:
        async with self._locks.setdefault(rollout_id, asyncio.Lock()):
            if rollout_id in self._open:
                present, sandbox = self._open[rollout_id]
                if attempt == present:
                    return sandbox
                if attempt < present:
                    raise LogFenced(
                        problem(
                            f"attempt {attempt} of rollout {rollout_id!r} calls a tool; attempt {present} has begun",
                            consequence="The call was not run",
                            remedy="Stop that attempt; the later one carries on",
                        )
                    )
                # Resumed in this process: from the log again, as if the process were new.
                await self._open.pop(rollout_id)[1].close()
            made = await self._make_sandbox(rollout_id, metadata)
            try:
                sandbox = await LoggedSandbox.open(self._log, rollout_id, made, state=self._state, policy=self._policy)
            except BaseException:
                await made.close()
                raise
            self._open[rollout_id] = attempt, sandbox
            return sandbox


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text")
    return value


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}
