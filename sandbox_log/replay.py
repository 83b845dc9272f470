"""LoggedSandbox: stands before a sandbox, writes down what it does, and answers from the log what was done before."""

from __future__ import annotations

import asyncio
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from types import TracebackType
from typing import Any

from .doubt import DoubtPolicy
from .errors import ReplayExhausted, ReplayMismatch, SandboxError, StateLost, problem
from .live import LiveSandbox, StateChoice, in_doubt
from .log import SandboxLog
from .sandbox import Call, Operation, Result, Sandbox
from .steps import NO_CAUSE, Cause, History, compare, intent_body, result_of


class Mode(StrEnum):
    """What to do with what is in the log already."""

    STRICT = "strict"
    """Answer from the log alone. Nothing is run and nothing is logged."""
    PREFIX_THEN_LIVE = "prefix_then_live"
    """Answer from the log while it lasts, then go live."""
    PROVENANCE = "provenance"
    """Answer nothing from the log; only write down."""


@dataclass(slots=True)
class _Turn:
    """One caller's place in the queue."""

    call: Call
    cause: Cause
    begun: bool = False


class LoggedSandbox:
    """One sandbox with its log. Make one with `open`.

    Calls are done one at a time, in the order in which they came in: that is their one total order. Any number of
    tasks of one event loop may call. A cancelled caller gets nothing, but a command that was dispatched for it is
    waited for and its outcome logged.
    """

    def __init__(
        self, log: SandboxLog, sandbox_id: str, mode: Mode, history: History, live: LiveSandbox | None
    ) -> None:
        self.log = log
        self.sandbox_id = sandbox_id
        self.mode = mode
        self._history = history
        self._salt: bytes = history.header.body["salt"]
        self._live = live
        self._cursor = len(history.steps) if mode is Mode.PROVENANCE else 0
        self._lock = asyncio.Lock()
        self._queued = 0

    @classmethod
    async def open(
        cls,
        log: SandboxLog,
        sandbox_id: str,
        sandbox: Sandbox | None,
        *,
        mode: Mode = Mode.PREFIX_THEN_LIVE,
        state: StateChoice | None = None,
        policy: DoubtPolicy | None = None,
    ) -> LoggedSandbox:
        """Begin a sandbox's log, or carry on with it; verifies its whole chain.

        Args:
            log: open for writing, unless the mode is strict.
            sandbox_id: its name in the log.
            sandbox: what runs the commands; None only in strict replay.
            mode: what to do with what is in the log.
            state: how the sandbox has the state that the log speaks of. Needed when a log with commands in
                it goes live in the mode `prefix_then_live`; in the other modes it counts for nothing.
            policy: what to do about a command in doubt.

        Raises:
            UnknownSandbox: strict replay of a sandbox that is not in the log.
            LogDamaged: its chain does not hold.
            ReplayMismatch: it was another kind of sandbox, or made from another image.
            StateLost: no sandbox was passed, or in the mode `provenance` one that was left half rebuilt.
        """
        if mode is Mode.STRICT:
            history = await asyncio.to_thread(lambda: History.of(log.events(sandbox_id)))
            return cls(log, sandbox_id, mode, history, None)
        if sandbox is None:
            raise StateLost(
                problem(
                    f"no sandbox was passed for {sandbox_id!r}",
                    consequence="Nothing can be run",
                    remedy="Pass one, or use strict replay, which needs none",
                )
            )
        writer = await asyncio.to_thread(log.writer, sandbox_id, _header(sandbox_id, sandbox))
        # After taking over: whoever was the writer can add nothing more to what is read here.
        history = await asyncio.to_thread(lambda: History.of(log.events(sandbox_id)))
        for name in ("backend", "image_digest"):
            expected, got = history.header.body[name], getattr(sandbox.info, name)
            if expected != got:
                raise ReplayMismatch(sandbox_id, 0, name, expected, got)
        resuming = bool(history.steps)
        if mode is Mode.PROVENANCE:
            if sandbox.info.instance in history.rebuilding:
                raise StateLost(
                    problem(
                        f"a rebuild of the state of sandbox {sandbox_id!r} began in this instance and did not end",
                        consequence="Nothing was run in it",
                        remedy="Pass another sandbox",
                    )
                )
            state, resuming = None, False  # nothing is answered from the log, so nothing of it is run again either
        policy = policy or DoubtPolicy()
        live = LiveSandbox(log, writer, sandbox, history, state=state, policy=policy, resuming=resuming)
        return cls(log, sandbox_id, mode, history, live)

    async def exec(
        self,
        command: str,
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
        idempotent: bool = False,
        cause: Cause = NO_CAUSE,
    ) -> Result:
        """Run a command with the sandbox's shell. See `Call` and `run`."""
        arguments = {"command": command}
        call = Call(Operation.EXEC, arguments, stdin, cwd, dict(env or {}), timeout_s, idempotent)
        return await self.run(call, cause)

    async def shell(
        self, command: str, *, session: str = "main", timeout_s: float = 120.0, cause: Cause = NO_CAUSE
    ) -> Result:
        """Run a command in a persistent shell: directory, variables and background jobs stay."""
        call = Call(Operation.SHELL, {"session": session, "command": command}, timeout_s=timeout_s)
        return await self.run(call, cause)

    async def read_file(self, path: str, *, timeout_s: float = 60.0, cause: Cause = NO_CAUSE) -> Result:
        """The bytes of a file, as stdout."""
        call = Call(Operation.READ_FILE, {"path": path}, timeout_s=timeout_s, idempotent=True)
        return await self.run(call, cause)

    async def write_file(self, path: str, data: bytes, *, timeout_s: float = 60.0, cause: Cause = NO_CAUSE) -> Result:
        """Replace the content of a file; its directory is made if need be."""
        call = Call(Operation.WRITE_FILE, {"path": path}, stdin=data, timeout_s=timeout_s, idempotent=True)
        return await self.run(call, cause)

    async def run(self, call: Call, cause: Cause = NO_CAUSE) -> Result:
        """Answer a call from the log, or do it and log it.

        Raises:
            BadCall: it cannot be logged.
            ReplayMismatch: it is not the call that the log has at this point.
            ReplayExhausted: strict replay has come to the end of the log.
            InDoubt: it, or the call before it, was dispatched and nobody knows what became of it.
            StateLost: the sandbox's state cannot be had the way the caller chose.
            LogFenced, LogPoisoned: this process must stop.
        """
        if not self._queued and (answer := self._replay(call, cause)) is not None:
            return answer
        turn = _Turn(call, cause)
        self._queued += 1
        task = asyncio.ensure_future(self._take_turn(turn))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if turn.begun:
                task.add_done_callback(_retrieve)
            else:
                task.cancel()
            raise

    async def snapshot(self) -> str | None:
        """Save the sandbox's state and log it; None if the sandbox cannot, or while the log still answers."""
        async with self._lock:
            live = self._check()
            if live is None or self.replaying or not live.ready:
                return None
            return await live.snapshot()

    async def record_lost(self) -> Result:
        """Settle the call in doubt as lost: its outcome says that nobody knows. The only way past it by hand.

        Raises:
            SandboxError: no call is in doubt.
        """
        async with self._lock:
            live, step = self._check(), self._history.pending
            if step is None or live is None:
                raise SandboxError(
                    problem(
                        f"sandbox {self.sandbox_id!r} has no call in doubt that this process could settle",
                        consequence="Nothing was logged",
                        remedy="Call this after InDoubt was raised",
                    )
                )
            result = await live.record_lost(step)
            self._cursor = len(self._history.steps)
            return result

    @property
    def replaying(self) -> bool:
        """The next call is answered from the log, if it matches."""
        return self._cursor < len(self._history.steps)

    async def close(self) -> None:
        """Wait for calls under way, then close the sandbox."""
        async with self._lock:
            if self._live is not None:
                await self._live.sandbox.close()

    async def __aenter__(self) -> LoggedSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _replay(self, call: Call, cause: Cause) -> Result | None:
        """The answer of the log, or None if it has none."""
        if self._cursor >= len(self._history.steps):
            return None
        step = self._history.steps[self._cursor]
        if step.outcome is None:
            return None
        compare(self.sandbox_id, step.intent, intent_body(call, cause, self._salt))
        step.call = call
        result = result_of(self.log, step.outcome)
        self._cursor += 1
        return result

    async def _take_turn(self, turn: _Turn) -> Result:
        try:
            async with self._lock:
                live = self._check()
                if (answer := self._replay(turn.call, turn.cause)) is not None:
                    return answer
                turn.begun = True
                if live is None:
                    raise self._exhausted()
                try:
                    return await self._run_live(live, turn)
                finally:
                    # Whatever happened, only a call in doubt is left to be answered.
                    self._cursor = len(self._history.steps) - (self._history.pending is not None)
        finally:
            self._queued -= 1

    async def _run_live(self, live: LiveSandbox, turn: _Turn) -> Result:
        body = intent_body(turn.call, turn.cause, self._salt)
        step = self._history.pending
        if step is not None:
            try:
                compare(self.sandbox_id, step.intent, body)
            except ReplayMismatch:
                if live.resuming:  # the rollout has taken another course
                    raise
                await live.settle(step)  # another call than the one in doubt; that one first
            else:
                step.call = turn.call
                return await live.settle(step)  # this very call
        await live.have_state()
        return await live.run(turn.call, body)

    def _exhausted(self) -> SandboxError:
        if (step := self._history.pending) is not None:
            return in_doubt(self.sandbox_id, step, {"strict": "replay runs nothing"})
        return ReplayExhausted(
            problem(
                f"the log of sandbox {self.sandbox_id!r} ends after {len(self._history.steps)} calls",
                consequence="Strict replay runs nothing, so there is no answer",
                remedy="Use the mode prefix_then_live to go on from here",
            )
        )

    def _check(self) -> LiveSandbox | None:
        if self._live is not None and self._live.failure is not None:
            raise self._live.failure
        return self._live


def _header(sandbox_id: str, sandbox: Sandbox) -> dict[str, Any]:
    info = sandbox.info
    ours = {"python": platform.python_version(), "kernel": platform.release(), "rollout-wal": _version()}
    return {
        "sandbox_id": sandbox_id,
        "backend": info.backend,
        "image_digest": info.image_digest,
        "isolation": dict(info.isolation),
        "versions": {**ours, **info.versions},
        "instance": info.instance,
        "salt": secrets.token_bytes(16),
    }


def _version() -> str:
    try:
        return metadata.version("rollout-wal")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _retrieve(task: asyncio.Future[Result]) -> None:
    """Its caller is gone. A result is in the log; what an error leaves behind, the next call meets."""
    if not task.cancelled():
        task.exception()
