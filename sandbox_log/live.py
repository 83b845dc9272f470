"""Beyond the end of the log: run calls and log them, settle calls in doubt, have the state that the log speaks of.

The order that everything rests on, for each call:

    intent durable ─▶ still the writer? ─▶ dispatch ─▶ outcome durable ─▶ the caller sees it
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from .appends import SandboxWriter
from .doubt import DoubtPolicy, probe_until_settled
from .errors import BadCall, InDoubt, LogFenced, NotStarted, ReplayMismatch, SandboxError, StateLost, problem
from .events import End, Event, Kind, payload_to_plain
from .faults import BEFORE_INTENT, BEFORE_OUTCOME, INTENT_DURABLE, OUTCOME_DURABLE
from .log import SandboxLog
from .sandbox import Call, Operation, ProbeState, Result, Sandbox
from .steps import History, Step, call_of, difference, outcome_body, result_of


class StateChoice(StrEnum):
    """How the sandbox comes to have the state that the log speaks of. Replayed answers rebuild no file system."""

    REATTACH = "reattach"
    """It survived: it is the very instance that ran the logged commands."""
    SNAPSHOT = "snapshot"
    """Restore the last snapshot, then run the commands after it again and compare their outputs."""
    REEXECUTE = "reexecute"
    """Run all logged commands again in a new sandbox and compare their outputs."""


class LiveSandbox:
    """A sandbox, its writer and its history. Not for two tasks at once: `LoggedSandbox` sees to that.

    Args:
        log: open for writing.
        writer: of this sandbox.
        sandbox: what runs the commands.
        history: what the log holds so far; grows as events are added.
        state: how the sandbox has the state of the log; None if nobody said.
        policy: what may be tried for a call in doubt.
        resuming: the log holds calls of an earlier process, whose state the sandbox must be seen to have.
    """

    def __init__(
        self,
        log: SandboxLog,
        writer: SandboxWriter,
        sandbox: Sandbox,
        history: History,
        *,
        state: StateChoice | None,
        policy: DoubtPolicy,
        resuming: bool,
    ) -> None:
        self.sandbox = sandbox
        self.resuming = resuming
        """The sandbox has not been seen to have the state that the log speaks of."""
        self.failure: SandboxError | None = None
        """What ended it for good: the log failed, or another process owns the sandbox now."""
        self._log = log
        self._writer = writer
        self._history = history
        self._state = state
        self._policy = policy
        self._rebuilt = False
        """The state was rebuilt, and nothing was dispatched since."""
        self._lost_sessions: set[str] = set()

    @property
    def ready(self) -> bool:
        """The sandbox has the state that the log speaks of, as far as anybody could know."""
        return not self.resuming and not self._half_rebuilt

    @property
    def _half_rebuilt(self) -> bool:
        return self.sandbox.info.instance in self._history.rebuilding

    async def run(self, call: Call, body: dict[str, Any]) -> Result:
        """Do a new call.

        Args:
            call: the call.
            body: of its intent, but for the fields that only a dispatch has.
        """
        self._check_session(call)
        self._log.faults(BEFORE_INTENT)
        if len(call.stdin) > self._log.inline_bytes_max:
            body["stdin"] = payload_to_plain(await asyncio.to_thread(self._log.store, call.stdin))
        body["exec_id"] = self._exec_id()
        body["instance"] = self.sandbox.info.instance
        await self.append(Kind.INTENT, body)
        step = self._history.steps[-1]
        step.call = call
        return await self._dispatch(step, call, "run")

    async def settle(self, step: Step, cause: BaseException | None = None, *, retried: bool = False) -> Result:
        """Find out what became of a call in doubt, or do it where that is sound.

        Args:
            step: the call.
            cause: what put it in doubt, where that happened in this process.
            retried: it was dispatched again already, in vain; find out, but do no more.

        Raises:
            InDoubt: neither.
        """
        tried: dict[str, str] = {}
        call = step.call or call_of(self._log, step.intent)
        reason = None
        if self._policy.probe:
            found = await self._probe(step, tried)
            if isinstance(found, Result):
                # Before the state is rebuilt: it is a settled call now, and part of what is rebuilt.
                answer = await self._log_outcome(step, found, "probe")
                await self.have_state()
                return answer
            reason = found
        if retried:
            tried["rerun"], reason = f"it was dispatched again and failed again: {cause}", None
        elif call is None:
            tried["rerun"] = "the values of its environment variables are not known"
        elif "running" not in tried:
            reason = await self._may_dispatch(call, reason, tried)
        if call is None or reason is None:
            raise in_doubt(self._writer.sandbox_id, step, tried) from cause
        self._check_session(call)
        step.call = call
        instance = self.sandbox.info.instance
        retry = {"intent": step.intent.sequence, "exec_id": self._exec_id(), "instance": instance, "reason": reason}
        await self.append(Kind.RETRY, retry)
        return await self._dispatch(step, call, "retry")

    async def record_lost(self, step: Step) -> Result:
        """Give a call in doubt up."""
        result = Result(End.TRANSPORT_LOST, notes=("whether and how far the command ran is unknown",))
        return await self._log_outcome(step, result, "given up")

    async def snapshot(self) -> str | None:
        """Save the state and log its name."""
        name = await self.sandbox.snapshot()
        if name is not None:
            await self.append(Kind.SNAPSHOT, {"name": name, "instance": self.sandbox.info.instance})
        return name

    async def append(self, kind: Kind, body: Mapping[str, Any]) -> Event:
        """Add an event to the log and to the history; it is durable when this returns.

        Raises:
            BadCall: a body that cannot be logged. Nothing was handed to the log, and the next call may go on.
        """
        appended = self._writer.append(kind, body)
        try:
            event = await asyncio.wrap_future(appended)
        except SandboxError as error:
            self.failure = error
            raise
        self._history.add(event)
        return event

    async def _dispatch(self, step: Step, call: Call, via: str) -> Result:
        exec_id = step.dispatches[-1][0]
        self._rebuilt = False  # should the answer be lost, the state is no longer one without this call
        self._log.faults(INTENT_DURABLE)
        try:
            self._writer.check()
            result = await self.sandbox.run(call, exec_id)
        except (NotStarted, BadCall) as error:
            result = Result(End.NOT_STARTED, stderr=str(error).encode("utf-8", "backslashreplace"))
        except LogFenced as error:
            self.failure = error
            raise
        except Exception as error:  # TransportLost, or a backend that broke: either way nobody knows
            return await self.settle(step, error, retried=via == "retry")
        self._log.faults(BEFORE_OUTCOME)
        answer = await self._log_outcome(step, result, via)
        await self.sandbox.forget(exec_id)
        return answer

    async def _log_outcome(self, step: Step, result: Result, via: str) -> Result:
        arguments = (self._log, step.intent.sequence, result, via)
        if max(len(result.stdout), len(result.stderr)) > self._log.inline_bytes_max:
            body = await asyncio.to_thread(outcome_body, *arguments)  # compression and syncs: not on the event loop
        else:
            body = outcome_body(*arguments)
        try:
            await self.append(Kind.OUTCOME, body)
        except BadCall as error:  # the backend's mistake: the call was sound, and nobody may be told that it was not
            raise in_doubt(self._writer.sandbox_id, step, {"outcome": str(error)}) from error
        self._log.faults(OUTCOME_DURABLE)
        return result

    # -- in doubt

    async def _may_dispatch(self, call: Call, reason: str | None, tried: dict[str, str]) -> str | None:
        """Why a call in doubt may be dispatched (again); None if it may not, with the reasons in `tried`."""
        try:
            await self.have_state()
        except (StateLost, ReplayMismatch) as error:
            tried["state"] = str(error)
            return None
        if reason is not None:
            return reason
        if not call.idempotent:
            tried["rerun"] = "it is not declared idempotent"
        elif not self._policy.rerun_idempotent:
            tried["rerun"] = "the policy forbids it"
        else:  # before a rebuild, which puts at risk the state that is there
            return "it is declared idempotent"
        return await self._rebuild(tried)

    async def _probe(self, step: Step, tried: dict[str, str]) -> Result | str | None:
        """Its result; or why it may be dispatched; or None, with what was found out in `tried`."""
        body = step.intent.body
        call = Call(Operation(body["operation"]), body["arguments"], timeout_s=body["timeout_s"])
        exec_id, instance = step.dispatches[-1]
        if instance != self.sandbox.info.instance:
            tried["probe"] = "this is not the instance of the sandbox that the command was sent to"
            return None
        probe = await probe_until_settled(self.sandbox, call, exec_id, self._policy)
        if probe.state is ProbeState.RUNNING:
            tried["running"] = f"it still runs after {call.timeout_s + self._policy.wait_s:g} s"
        else:
            tried["probe"] = f"{probe.state} {probe.detail}".strip()
        return probe.result or ("it never started" if probe.state is ProbeState.NEVER_STARTED else None)

    async def _rebuild(self, tried: dict[str, str]) -> str | None:
        """Have the state as it was before the command in doubt. Returns why it may be dispatched then."""
        if not self._policy.rebuild:
            tried["rebuild"] = "the policy forbids it"
        elif self._rebuilt:
            return "the state was rebuilt without it"
        elif not self._history.snapshots:
            tried["rebuild"] = "there is no snapshot"
        else:
            try:
                await self._restore()
            except (StateLost, ReplayMismatch) as error:
                tried["rebuild"] = str(error)
            else:
                return "a snapshot from before it was restored"
        return None

    # -- state

    async def have_state(self) -> None:
        """Bring the sandbox into the state that the log speaks of, the way the caller chose.

        Raises:
            StateLost: it cannot be had that way.
            ReplayMismatch: a command that was run again gave another output.
        """
        if self.ready:
            return
        info = self.sandbox.info
        # One that had the state and lost it over a call in doubt stands where a reattached one does.
        lost_here = not self.resuming and self._state is not StateChoice.SNAPSHOT
        if lost_here or self._state is StateChoice.REATTACH:
            if info.instance != self._history.instances[-1]:
                raise self._state_lost(f"the sandbox is {info.instance}, the log's is {self._history.instances[-1]}")
            if self.resuming:
                self._lost_sessions = self._sessions(len(self._history.steps))
            await self._reattach()
        elif self._state is StateChoice.SNAPSHOT:
            await self._restore()
            self._rebuilt = True
        elif self._state is StateChoice.REEXECUTE:
            if info.instance in self._history.instances:
                raise self._state_lost("this sandbox has run the logged commands already; use a new one, or reattach")
            await self._log_state("begun", 0)
            await self._reexecute(0)
            await self._log_state("done", 0)
            self._rebuilt = True
        else:
            raise self._state_lost("nobody said how the sandbox has the state that the log speaks of")
        self.resuming = False

    async def _reattach(self) -> None:
        if not self._half_rebuilt:
            await self._log_state("done", 0)
        elif self._history.pending is not None and self._policy.rebuild:
            # A crash, or another output, cut short what was done for the call in doubt. It may be done again for it.
            await self._restore()
            self._rebuilt = True
        else:
            raise self._state_lost("a rebuild of its state began and did not come to its end")

    async def _restore(self) -> None:
        if not self._history.snapshots:
            raise self._state_lost("the log has no snapshot")
        first, name = self._history.snapshots[-1]
        if sessions := sorted(self._sessions(first)):
            raise self._state_lost(f"the snapshot {name} holds no processes, and the shells {sessions} were open")
        whole = self.ready or (not self._half_rebuilt and self.sandbox.info.instance == self._history.instances[-1])
        await self._log_state("begun", first, name)
        try:
            await self.sandbox.restore(name)
        except StateLost:  # by its contract the state is as it was before
            if whole:
                await self._log_state("refused", first, name)
            raise
        await self._reexecute(first)
        await self._log_state("done", first, name)

    async def _reexecute(self, first: int) -> None:
        """Run the settled steps from `first` on again; their outputs must be the logged ones."""
        for step in self._history.steps[first:]:
            if step.outcome is None:
                continue
            call = step.call or call_of(self._log, step.intent)
            if call is None:
                raise self._state_lost(f"the environment variables of event {step.intent.sequence} are not known")
            self._writer.check()
            exec_id = self._exec_id()
            result = await self.sandbox.run(call, exec_id)
            await self.sandbox.forget(exec_id)
            logged = result_of(self._log, step.outcome)
            if found := difference(logged, result):
                name, expected, got = found
                where = f"{name}, run again,"
                raise ReplayMismatch(self._writer.sandbox_id, step.outcome.sequence, where, expected, got)

    async def _log_state(self, phase: str, first: int, snapshot: str | None = None) -> None:
        info = self.sandbox.info
        body = {
            "choice": self._state,
            "phase": phase,
            "first_step": first,
            "snapshot": snapshot,
            "instance": info.instance,
            "isolation": info.isolation,
        }
        await self.append(Kind.STATE, body)

    def _sessions(self, steps: int) -> set[str]:
        bodies = [step.intent.body for step in self._history.steps[:steps]]
        return {body["arguments"]["session"] for body in bodies if body["operation"] == Operation.SHELL}

    def _check_session(self, call: Call) -> None:
        if call.operation is Operation.SHELL and call.arguments.get("session") in self._lost_sessions:
            raise self._state_lost(f"the shell {call.arguments['session']!r} died with the process that had it open")

    def _state_lost(self, why: str) -> StateLost:
        return StateLost(
            problem(
                f"sandbox {self._writer.sandbox_id!r} cannot go live: {why}",
                consequence="The call was not run",
                remedy="Choose StateChoice.REATTACH, SNAPSHOT or REEXECUTE as fits, or end the rollout here",
            )
        )

    def _exec_id(self) -> str:
        return f"{self._writer.next_sequence}-{secrets.token_hex(8)}"


def in_doubt(sandbox_id: str, step: Step, tried: Mapping[str, str]) -> InDoubt:
    """The error for a call in doubt, with what the log knows of it and what was tried."""
    exec_id, instance = step.dispatches[-1]
    names = ("operation", "arguments", "cwd", "env_names", "timeout_s", "idempotent", "rollout_id", "position")
    known = {name: step.intent.body[name] for name in names}
    known |= {"exec_id": exec_id, "instance": instance, "dispatches": len(step.dispatches), "tried": dict(tried)}
    return InDoubt(sandbox_id, step.intent.sequence, known)
