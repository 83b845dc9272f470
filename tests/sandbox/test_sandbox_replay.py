"""LoggedSandbox: the order of things, replay and its mismatches, calls in doubt, and how the state is had."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_log.backends.functions import Function, FunctionSandbox
from sandbox_log.backends.local import LocalSandbox
from sandbox_log.doubt import DoubtPolicy
from sandbox_log.errors import (
    BadCall,
    InDoubt,
    LogFenced,
    LogPoisoned,
    ReplayExhausted,
    ReplayMismatch,
    SandboxError,
    StateLost,
    TransportLost,
)
from sandbox_log.events import Effect, End, Kind
from sandbox_log.live import StateChoice
from sandbox_log.log import SandboxLog
from sandbox_log.replay import LoggedSandbox, Mode
from sandbox_log.sandbox import Call, Operation, Probe, ProbeState, Result, SandboxInfo
from sandbox_log.steps import Cause


class Recorder:
    """A sandbox in memory whose state is the list of commands that ran. Says of itself what a test wants.

    Args:
        plan: maps a command to what happens instead of running it; "lost" runs it and loses the answer,
            "lost before" loses it before it runs.
    """

    def __init__(self, instance: str = "one", plan: dict[str, str] | None = None, **known: Probe) -> None:
        self.ran: list[str] = []
        self.saved: dict[str, list[str]] = {}
        self.known = known
        self.probed: list[str] = []
        self.plan = plan or {}
        self.info = SandboxInfo("recorder", "image", {"all": "in memory"}, {}, instance)

    async def run(self, call: Call, exec_id: str) -> Result:
        command = str(call.arguments.get("command", call.arguments.get("path")))
        what = self.plan.pop(command, "")
        if what == "lost before":
            raise TransportLost("lost before")
        self.ran.append(command)
        if what == "lost":
            raise TransportLost("lost")
        if what == "bug":
            raise RuntimeError("a bug in the backend")
        if what == "slow":
            await asyncio.sleep(0.2)
        text = f"{command}#{self.ran.count(command)}".encode() + call.stdin
        return Result(End.EXITED, 0, stdout=text, stderr=b"e", duration_s=1.5, effects=(Effect("f", "modified", 1),))

    async def probe(self, call: Call, exec_id: str) -> Probe:
        self.probed.append(exec_id)
        return self.known.get(str(call.arguments["command"]), Probe(ProbeState.UNKNOWN, detail="no idea"))

    async def forget(self, exec_id: str) -> None: ...

    async def snapshot(self) -> str | None:
        self.saved[name := f"s{len(self.saved)}"] = list(self.ran)
        return name

    async def restore(self, snapshot: str) -> None:
        if snapshot not in self.saved:
            raise StateLost("no such snapshot")
        self.ran = list(self.saved[snapshot])

    async def close(self) -> None: ...


def scenario(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test, run to its end."""

    def test(log: SandboxLog) -> None:
        asyncio.run(asyncio.wait_for(function(log), 60))  # type: ignore[arg-type]

    test.__name__ = function.__name__
    return test


async def _begin(log: SandboxLog, sandbox: Any, *commands: str) -> LoggedSandbox:
    logged = await LoggedSandbox.open(log, "a", sandbox)
    for command in commands:
        await logged.exec(command)
    return logged


@scenario
async def test_the_intent_is_durable_before_dispatch_and_the_outcome_before_anyone_sees_it(log: SandboxLog) -> None:
    seen: list[tuple[str, int]] = []

    class Spy(Recorder):
        async def run(self, call: Call, exec_id: str) -> Result:
            last = list(log.events("a"))[-1]
            assert (last.kind, last.body["exec_id"]) == (Kind.INTENT, exec_id)
            seen.append((exec_id, last.sequence))
            return await super().run(call, exec_id)

    logged = await LoggedSandbox.open(log, "a", Spy())
    before = log.commits
    result = await logged.exec("x", stdin=b"in", cwd="d", env={"K": "secret-value"}, cause=Cause("r1", 17, 2))
    assert log.commits - before == 2, "two durable commits for one command"
    header, intent, outcome = log.events("a")
    assert seen == [(intent.body["exec_id"], 1)]
    assert header.body["isolation"] == {"all": "in memory"}
    assert header.body["image_digest"] == "image"
    body = intent.body
    assert (body["rollout_id"], body["position"], body["attempt"]) == ("r1", 17, 2)
    assert (body["operation"], body["arguments"], body["stdin"], body["cwd"]) == ("exec", {"command": "x"}, b"in", "d")
    assert body["env_names"] == ["K"]
    assert len(body["env_digest"]) == 32
    assert outcome.body["stdout"] == result.stdout == b"x#1in"
    assert (outcome.body["stdout_bytes"], outcome.body["stderr_bytes"]) == (5, 1)
    assert outcome.body["effects"] == [{"path": "f", "change": "modified", "size": 1, "digest": None}]
    data = b"".join(path.read_bytes() for path in log.path.glob("*.mdb"))
    assert b"secret-value" not in data, "values of environment variables are never logged"


@scenario
async def test_replay_answers_from_the_log_then_goes_live(log: SandboxLog) -> None:
    sandbox = Recorder()
    first = await _begin(log, sandbox, "a", "b")
    answers = [await first.exec("c", stdin=bytes(100_000))]
    again = await LoggedSandbox.open(log, "a", sandbox, state=StateChoice.REATTACH)
    assert again.replaying
    replayed = [await again.exec("a"), await again.exec("b"), await again.exec("c", stdin=bytes(100_000))]
    assert [result.stdout[:3] for result in replayed] == [b"a#1", b"b#1", b"c#1"]
    assert replayed[2] == answers[0]
    assert sandbox.ran == ["a", "b", "c"], "nothing ran twice"
    assert not again.replaying
    assert (await again.exec("a")).stdout == b"a#2"
    states = [event.body for event in log.events("a") if event.kind is Kind.STATE]
    assert [(state["choice"], state["phase"]) for state in states] == [("reattach", "done")]


@scenario
async def test_strict_replay_needs_no_sandbox_and_ends_with_the_log(log: SandboxLog) -> None:
    await _begin(log, Recorder(), "a")
    before = list(log.events("a"))
    strict = await LoggedSandbox.open(log, "a", None, mode=Mode.STRICT)
    assert (await strict.exec("a")).stdout == b"a#1"
    with pytest.raises(ReplayExhausted, match="after 1 calls"):
        await strict.exec("b")
    assert list(log.events("a")) == before


@scenario
async def test_provenance_mode_answers_nothing_from_the_log(log: SandboxLog) -> None:
    sandbox = Recorder()
    await _begin(log, sandbox, "a")
    again = await LoggedSandbox.open(log, "a", sandbox, mode=Mode.PROVENANCE)
    assert (await again.exec("b")).stdout == b"b#1"
    assert (await again.exec("a")).stdout == b"a#2"
    assert [e.body["arguments"]["command"] for e in log.events("a") if e.kind is Kind.INTENT] == ["a", "b", "a"]


@scenario
async def test_provenance_mode_runs_nothing_of_the_log_again_and_nothing_in_a_half_rebuilt_sandbox(
    log: SandboxLog,
) -> None:
    await _begin(log, Recorder(), "a")
    half = Recorder("two")
    half.ran = ["a"]
    resumed = await LoggedSandbox.open(log, "a", half, state=StateChoice.REEXECUTE)
    await resumed.exec("a")
    with pytest.raises(ReplayMismatch):
        await resumed.exec("b")
    for n, state in enumerate((None, *StateChoice)):
        fresh = Recorder(f"fresh {n}")
        logged = await LoggedSandbox.open(log, "a", fresh, mode=Mode.PROVENANCE, state=state)
        assert (await logged.exec("c")).stdout == b"c#1"
        assert fresh.ran == ["c"]
        with pytest.raises(StateLost, match="did not end"):
            await LoggedSandbox.open(log, "a", half, mode=Mode.PROVENANCE, state=state)
    again = await LoggedSandbox.open(log, "a", fresh, state=StateChoice.REATTACH)
    for command in "acccc":
        await again.exec(command)
    assert (await again.exec("d")).ok, "what was left half done elsewhere is nothing to this one"


_BASE: dict[str, Any] = {"operation": Operation.EXEC, "arguments": {"command": "a"}, "env": {"K": "v"}}


@pytest.mark.parametrize(
    ("change", "cause", "field"),
    [
        ({"arguments": {"command": "b"}}, Cause("r", 1), "arguments.command"),
        ({"arguments": {"command": "a", "n": True}}, Cause("r", 1), "arguments.n"),
        ({"operation": Operation.READ_FILE, "arguments": {"path": "a"}}, Cause("r", 1), "operation"),
        ({"cwd": "elsewhere"}, Cause("r", 1), "cwd"),
        ({"env": {}}, Cause("r", 1), "env_names"),
        ({"env": {"K": "other"}}, Cause("r", 1), "env_digest"),
        ({"timeout_s": 5.0}, Cause("r", 1), "timeout_s"),
        ({"idempotent": True}, Cause("r", 1), "idempotent"),
        ({"stdin": b"x"}, Cause("r", 1), "stdin"),
        ({}, Cause("q", 1), "rollout_id"),
        ({}, Cause("r", 2), "position"),
        ({}, Cause("r", 1, attempt=9), None),
    ],
)
def test_a_call_that_is_not_the_logged_one_names_the_field(
    log: SandboxLog, change: dict[str, Any], cause: Cause, field: str | None
) -> None:
    async def main() -> None:
        sandbox = Recorder()
        logged = await LoggedSandbox.open(log, "a", sandbox)
        await logged.run(Call(**{**_BASE, "arguments": {"command": "a", "n": 1}}), Cause("r", 1))
        again = await LoggedSandbox.open(log, "a", sandbox, state=StateChoice.REATTACH)
        default = {**_BASE, "arguments": {"command": "a", "n": 1}}
        if field == "arguments.command":
            change["arguments"]["n"] = 1
        call = Call(**{**default, **change})
        if field is None:
            assert (await again.run(call, cause)).stdout == b"a#1"
            return
        with pytest.raises(ReplayMismatch) as caught:
            await again.run(call, cause)
        assert (caught.value.sequence, caught.value.field) == (1, field)
        assert caught.value.expected != caught.value.got or field == "arguments.n"
        assert sandbox.ran == ["a"]
        assert (await again.run(Call(**default), Cause("r", 1))).stdout == b"a#1", "the right call still answers"

    asyncio.run(main())


@scenario
async def test_another_image_or_backend_is_a_mismatch(log: SandboxLog) -> None:
    await _begin(log, Recorder(), "a")
    with pytest.raises(ReplayMismatch, match="backend is 'functions', logged was 'recorder'"):
        await LoggedSandbox.open(log, "a", FunctionSandbox({}))
    other = Recorder()
    other.info = SandboxInfo("recorder", "other image", {}, {}, "one")
    with pytest.raises(ReplayMismatch, match="image_digest"):
        await LoggedSandbox.open(log, "a", other)


@scenario
async def test_sixteen_callers_get_one_total_order(log: SandboxLog) -> None:
    sandbox = Recorder(plan={"c3": "slow"})
    logged = await LoggedSandbox.open(log, "a", sandbox)
    commands = [f"c{n}" for n in range(16)]
    results = await asyncio.gather(*(logged.exec(command) for command in commands))
    assert [result.stdout for result in results] == [f"{command}#1".encode() for command in commands]
    events = list(log.events("a"))[1:]
    assert [event.kind for event in events] == [Kind.INTENT, Kind.OUTCOME] * 16
    assert all(events[n + 1].body["intent"] == events[n].sequence for n in range(0, 32, 2))
    assert sandbox.ran == commands
    again = await LoggedSandbox.open(log, "a", None, mode=Mode.STRICT)
    assert await asyncio.gather(*(again.exec(command) for command in commands)) == results


@scenario
async def test_a_cancelled_caller_leaves_no_hole(log: SandboxLog) -> None:
    sandbox = Recorder(plan={"long": "slow"})
    logged = await LoggedSandbox.open(log, "a", sandbox)
    long, queued = asyncio.create_task(logged.exec("long")), asyncio.create_task(logged.exec("queued"))
    await asyncio.sleep(0.05)
    long.cancel()
    queued.cancel()
    await asyncio.gather(long, queued, return_exceptions=True)
    assert (await logged.exec("next")).ok
    assert sandbox.ran == ["long", "next"], "what had not begun was withdrawn, what had was finished"
    assert [event.kind for event in log.events("a")][1:] == [Kind.INTENT, Kind.OUTCOME] * 2


@scenario
async def test_a_writer_that_was_overtaken_dispatches_nothing(log: SandboxLog) -> None:
    sandbox = Recorder()
    old = await _begin(log, sandbox, "a")
    await LoggedSandbox.open(log, "a", sandbox, state=StateChoice.REATTACH)
    with pytest.raises(LogFenced):
        await old.exec("b")
    with pytest.raises(LogFenced):
        await old.exec("c")
    assert sandbox.ran == ["a"]


@scenario
async def test_being_overtaken_between_intent_and_dispatch_is_noticed(log: SandboxLog) -> None:
    sandbox = Recorder()
    old = await LoggedSandbox.open(log, "a", sandbox)
    log.faults = lambda point: point == "intent_durable" and log.writer("a", {})  # type: ignore[assignment, return-value]
    with pytest.raises(LogFenced):
        await old.exec("b")
    assert sandbox.ran == []


@scenario
async def test_a_poisoned_log_stops_the_sandbox_before_dispatch(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await LoggedSandbox.open(log, "a", sandbox)
    log._committer._poison.failure = OSError("disk")  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(LogPoisoned):
            await logged.exec("x")
    assert sandbox.ran == []


@scenario
async def test_bad_calls_log_nothing(log: SandboxLog) -> None:
    logged = await LoggedSandbox.open(log, "a", Recorder())
    for call in (
        Call(Operation.EXEC, {}),
        Call(Operation.EXEC, {"command": "nul\0"}),
        Call(Operation.EXEC, {"command": "\ud800"}),
        Call(Operation.EXEC, {"command": "x"}, timeout_s=float("nan")),
        Call(Operation.SHELL, {"command": "x"}),
        Call(Operation.CALL, {"name": 3}),
        Call(Operation.EXEC, {"command": "x", "bad": object()}),
    ):
        with pytest.raises(BadCall):
            await logged.run(call)
    assert len(list(log.events("a"))) == 1


@scenario
async def test_a_bad_call_harms_no_other_and_is_as_bad_when_it_is_repeated(log: SandboxLog) -> None:
    sandbox = Recorder()

    async def rollout(logged: LoggedSandbox) -> list[bytes]:
        out = []
        for n, bad in enumerate(("\ud800", 10**30, object())):
            call = Call(Operation.EXEC, {"command": "x", "more": bad})
            with pytest.raises(BadCall):
                await logged.run(call)
            out.append((await logged.write_file(f"f{n}", b"data")).stdout)
        return out

    first = await rollout(await LoggedSandbox.open(log, "a", sandbox))
    assert first == [b"f0#1data", b"f1#1data", b"f2#1data"]
    again = await LoggedSandbox.open(log, "a", sandbox, state=StateChoice.REATTACH)
    assert await rollout(again) == first
    assert sandbox.ran == ["f0", "f1", "f2"]


@scenario
async def test_a_result_that_cannot_be_logged_is_no_fault_of_the_call(log: SandboxLog) -> None:
    class Odd(Recorder):
        async def run(self, call: Call, exec_id: str) -> Result:
            return replace(await super().run(call, exec_id), notes=("\ud800",))

    logged = await LoggedSandbox.open(log, "a", Odd())
    with pytest.raises(InDoubt, match="outcome: a value cannot be written to the log"):
        await logged.exec("x")
    with pytest.raises(InDoubt):
        await logged.exec("y")
    assert (await logged.record_lost()).end is End.TRANSPORT_LOST


# -- in doubt


async def _resume(log: SandboxLog, sandbox: Any, state: StateChoice | None, **policy: Any) -> LoggedSandbox:
    return await LoggedSandbox.open(log, "a", sandbox, state=state, policy=DoubtPolicy(wait_s=0.2, **policy))


async def _leave_in_doubt(log: SandboxLog, sandbox: Recorder, command: str = "doubt", **options: Any) -> None:
    """Log an intent and no outcome, as a death in between does."""
    logged = await LoggedSandbox.open(log, "a", sandbox, state=StateChoice.REATTACH)

    def die(point: str) -> None:
        if point == "before_outcome":
            raise asyncio.CancelledError

    for step in logged._history.steps:
        await logged.exec(step.intent.body["arguments"]["command"])
    log.faults = die
    with pytest.raises(asyncio.CancelledError):
        await logged.exec(command, **options)
    log.faults = lambda point: None
    assert list(log.events("a"))[-1].kind is Kind.INTENT


@scenario
async def test_probe_finds_the_result_of_a_command_that_outlived_its_client(log: SandboxLog) -> None:
    sandbox = Recorder(doubt=Probe(ProbeState.FINISHED, Result(End.EXITED, 3, stdout=b"found")))
    await _begin(log, sandbox, "a")
    await _leave_in_doubt(log, sandbox)
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    await resumed.exec("a")
    result = await resumed.exec("doubt")
    assert (result.exit_status, result.stdout) == (3, b"found")
    intent = next(e for e in log.events("a") if e.kind is Kind.INTENT and e.body["arguments"]["command"] == "doubt")
    assert sandbox.probed == [intent.body["exec_id"]]
    assert sandbox.ran == ["a", "doubt"]
    outcomes = [event.body for event in log.events("a") if event.kind is Kind.OUTCOME]
    assert [body["via"] for body in outcomes] == ["run", "probe"]
    assert (await resumed.exec("next")).ok


@scenario
async def test_what_never_started_is_dispatched_under_a_new_exec_id(log: SandboxLog) -> None:
    sandbox = Recorder(doubt=Probe(ProbeState.NEVER_STARTED))
    await _leave_in_doubt(log, sandbox)
    sandbox.ran.clear()
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    assert (await resumed.exec("doubt")).stdout == b"doubt#1"
    intent, retry = (next(e.body for e in log.events("a") if e.kind is kind) for kind in (Kind.INTENT, Kind.RETRY))
    assert retry["exec_id"] != intent["exec_id"]
    assert retry["reason"] == "it never started"


@pytest.mark.parametrize("state", [ProbeState.DIED, ProbeState.UNKNOWN, ProbeState.RUNNING])
def test_nothing_is_run_again_on_a_guess(log: SandboxLog, state: ProbeState) -> None:
    async def main() -> None:
        sandbox = Recorder(doubt=Probe(state))
        await _leave_in_doubt(log, sandbox, timeout_s=0.1)
        resumed = await _resume(log, sandbox, StateChoice.REATTACH)
        for _ in range(2):
            with pytest.raises(InDoubt) as caught:
                await resumed.exec("doubt", timeout_s=0.1)
        known = caught.value.known
        assert known["arguments"] == {"command": "doubt"}
        assert set(known["tried"]) == ({"running"} if state is ProbeState.RUNNING else {"probe", "rebuild", "rerun"})
        assert sandbox.ran == ["doubt"]
        assert (await resumed.record_lost()).end is End.TRANSPORT_LOST
        assert (await resumed.exec("next")).ok
        with pytest.raises(SandboxError, match="no call in doubt"):
            await resumed.record_lost()

    asyncio.run(main())


@scenario
async def test_a_command_that_is_still_running_is_never_run_beside_itself(log: SandboxLog) -> None:
    sandbox = Recorder(doubt=Probe(ProbeState.RUNNING))
    await _leave_in_doubt(log, sandbox, idempotent=True, timeout_s=0.1)
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    with pytest.raises(InDoubt, match="still runs"):
        await resumed.exec("doubt", idempotent=True, timeout_s=0.1)
    assert sandbox.ran == ["doubt"]


@scenario
async def test_an_idempotent_call_is_run_again(log: SandboxLog) -> None:
    sandbox = Recorder()
    await _leave_in_doubt(log, sandbox, idempotent=True)
    forbidden = await _resume(log, sandbox, StateChoice.REATTACH, rerun_idempotent=False)
    with pytest.raises(InDoubt, match="policy forbids"):
        await forbidden.exec("doubt", idempotent=True)
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    assert (await resumed.exec("doubt", idempotent=True)).stdout == b"doubt#2"


@scenario
async def test_a_snapshot_from_before_is_restored_and_what_came_between_runs_again(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await _begin(log, sandbox, "a")
    assert await logged.snapshot() == "s0"
    await logged.exec("b")
    await _leave_in_doubt(log, sandbox)
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    for command in ("a", "b"):
        await resumed.exec(command)
    assert (await resumed.exec("doubt")).stdout == b"doubt#1"
    assert sandbox.ran == ["a", "b", "doubt"], "in this state it ran once"
    states = [(e.body["phase"], e.body["snapshot"]) for e in log.events("a") if e.kind is Kind.STATE]
    assert states[-2:] == [("begun", "s0"), ("done", "s0")]


@scenario
async def test_rebuilding_can_be_forbidden_and_fails_aloud_when_outputs_differ(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await _begin(log, sandbox, "a")
    await logged.snapshot()
    await logged.exec("b")
    await _leave_in_doubt(log, sandbox)
    forbidden = await _resume(log, sandbox, StateChoice.REATTACH, rebuild=False)
    await forbidden.exec("a")
    await forbidden.exec("b")
    with pytest.raises(InDoubt, match="rebuild: the policy forbids it"):
        await forbidden.exec("doubt")
    sandbox.saved["s0"] = ["a", "b"]  # not the state it was: b gives b#2 now
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    await resumed.exec("a")
    await resumed.exec("b")
    with pytest.raises(InDoubt, match="stdout, run again, is b'b#2', logged was b'b#1'"):
        await resumed.exec("doubt")


@scenario
async def test_nothing_runs_on_a_state_that_was_rebuilt_in_part(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await _resume(log, sandbox, None, rerun_idempotent=False)
    await logged.exec("a")
    await logged.snapshot()
    for command in ("b", "c"):
        await logged.exec(command)
    sandbox.saved["s0"] = ["b"]  # run again in it, b gives another output
    sandbox.plan["read"] = "lost"
    for _ in range(2):
        with pytest.raises(InDoubt, match="stdout, run again") as caught:
            await logged.exec("read", idempotent=True)
        assert sandbox.ran == ["b", "b"], "restored, begun again and no further"
    assert "state" in caught.value.known["tried"]
    with pytest.raises(InDoubt):
        await logged.exec("other")
    assert await logged.snapshot() is None
    logged = await _resume(log, sandbox, StateChoice.REATTACH)
    for command in ("a", "b", "c"):
        await logged.exec(command)
    with pytest.raises(InDoubt, match="stdout, run again"):  # not even what is harmless in a state that is whole
        await logged.exec("read", idempotent=True)
    await logged.record_lost()
    with pytest.raises(StateLost, match="did not come to its end"):
        await logged.exec("next")

    commands = ("a", "b", "c", "read")
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)  # as a new process would
    for command in commands:
        await resumed.exec(command, idempotent=command == "read")
    with pytest.raises(StateLost, match="did not come to its end"):
        await resumed.exec("next")
    assert sandbox.ran == ["b", "b"]


@scenario
async def test_what_is_harmless_is_run_again_before_the_state_is_put_at_risk(log: SandboxLog) -> None:
    sandbox = Recorder(plan={"read": "lost"})
    logged = await _begin(log, sandbox, "a")
    await logged.snapshot()
    await logged.exec("b")
    sandbox.saved["s0"] = ["b"]  # run again in it, b gives another output
    assert (await logged.exec("read", idempotent=True)).stdout == b"read#2"
    assert (await logged.exec("next")).ok
    assert sandbox.ran == ["a", "b", "read", "read", "next"], "nothing was restored"


@scenario
async def test_a_failed_rebuild_is_done_again_by_the_process_that_began_the_sandbox(log: SandboxLog) -> None:
    """It chose no state, for there was nothing to choose."""
    for n, settled in enumerate(("restored", "given up")):
        sandbox = Recorder(plan={"doubt": "lost"})
        logged = await LoggedSandbox.open(log, f"s{n}", sandbox)
        await logged.snapshot()
        await logged.exec("b")
        sandbox.saved["s0"] = ["b"]  # run again in it, b gives another output
        with pytest.raises(InDoubt):
            await logged.exec("doubt")
        if settled == "restored":
            sandbox.saved["s0"] = []
            assert (await logged.exec("doubt")).stdout == b"doubt#1"
            assert (await logged.exec("next")).ok
            assert sandbox.ran == ["b", "doubt", "next"]
        else:
            await logged.record_lost()
            with pytest.raises(StateLost, match="did not come to its end"):
                await logged.exec("next")


@scenario
async def test_a_rebuild_that_a_crash_cut_short_is_done_again_for_the_call_in_doubt(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await _begin(log, sandbox, "a")
    await logged.snapshot()
    await logged.exec("b")
    await _leave_in_doubt(log, sandbox)

    async def killed(call: Call, exec_id: str) -> Result:
        raise asyncio.CancelledError

    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    await resumed.exec("a")
    await resumed.exec("b")
    sandbox.run = killed  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await resumed.exec("doubt")
    del sandbox.run  # type: ignore[method-assign]
    assert sandbox.ran == ["a"]

    sandbox.known["doubt"] = Probe(ProbeState.NEVER_STARTED)  # which says nothing of what was to run before it
    forbidden = await _resume(log, sandbox, StateChoice.REATTACH, rebuild=False)
    await forbidden.exec("a")
    await forbidden.exec("b")
    with pytest.raises(InDoubt, match="did not come to its end"):
        await forbidden.exec("doubt")
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    await resumed.exec("a")
    await resumed.exec("b")
    assert (await resumed.exec("doubt")).stdout == b"doubt#1"
    assert sandbox.ran == ["a", "b", "doubt"]
    assert (await resumed.exec("next")).ok


@scenario
async def test_a_snapshot_that_is_gone_leaves_the_state_as_it_was(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await LoggedSandbox.open(log, "a", sandbox, state=StateChoice.REATTACH)
    await logged.exec("a")
    await logged.snapshot()
    sandbox.saved.clear()
    sandbox.plan["read"] = "lost before"
    assert (await logged.exec("read", idempotent=True)).stdout == b"read#1"
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    await resumed.exec("a")
    await resumed.exec("read", idempotent=True)
    assert (await resumed.exec("next")).stdout == b"next#1"


@scenario
async def test_a_new_sandbox_that_lacks_the_snapshot_has_no_state_to_reattach_to(log: SandboxLog) -> None:
    logged = await _begin(log, Recorder(), "a")
    await logged.snapshot()
    other = Recorder("two")
    for state, message in ((StateChoice.SNAPSHOT, "no such snapshot"), (StateChoice.REATTACH, "come to its end")):
        resumed = await _resume(log, other, state)
        await resumed.exec("a")
        with pytest.raises(StateLost, match=message):
            await resumed.exec("next")
    assert other.ran == []


@scenario
async def test_a_rebuilt_state_answers_only_for_what_was_in_doubt_before(log: SandboxLog) -> None:
    await _begin(log, Recorder(), "a")
    fresh = Recorder("two")
    resumed = await _resume(log, fresh, StateChoice.REEXECUTE)
    await resumed.exec("a")
    assert (await resumed.exec("b")).ok
    fresh.plan["c"] = "lost"
    with pytest.raises(InDoubt, match="there is no snapshot"):
        await resumed.exec("c")
    assert fresh.ran == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["lost", "lost before", "bug"])
def test_a_lost_answer_is_settled_at_once_and_a_retry_is_not_retried(log: SandboxLog, what: str) -> None:
    async def main() -> None:
        known = Probe(ProbeState.FINISHED, Result(End.EXITED, 0, stdout=b"there"))
        sandbox = Recorder(plan={"x": what, "y": what}, x=known)
        logged = await LoggedSandbox.open(log, "a", sandbox)
        assert (await logged.exec("x")).stdout == b"there"
        with pytest.raises(InDoubt) as caught:
            await logged.exec("y")
        assert isinstance(caught.value.__cause__, TransportLost | RuntimeError)
        with pytest.raises(InDoubt):
            await logged.exec("z")  # not past the one in doubt
        assert "z" not in sandbox.ran
        await logged.record_lost()
        sandbox.plan["w"] = what

        class Stubborn(dict):  # type: ignore[type-arg]
            def pop(self, key: str, default: str = "") -> str:  # type: ignore[override]
                return what if key == "w" else default

        sandbox.plan = Stubborn()
        with pytest.raises(InDoubt, match="failed again"):
            await logged.exec("w", idempotent=True)
        retries = [event for event in log.events("a") if event.kind is Kind.RETRY]
        assert len(retries) == 1

    asyncio.run(main())


# -- state


@scenario
async def test_going_live_needs_a_choice_and_reattaching_the_same_instance(log: SandboxLog) -> None:
    await _begin(log, Recorder(), "a")
    for sandbox, state, message in (
        (Recorder(), None, "nobody said"),
        (Recorder("two"), StateChoice.REATTACH, "the sandbox is two, the log's is one"),
        (Recorder(), StateChoice.SNAPSHOT, "no snapshot"),
        (Recorder(), StateChoice.REEXECUTE, "already"),
    ):
        resumed = await _resume(log, sandbox, state)
        assert (await resumed.exec("a")).stdout == b"a#1"
        with pytest.raises(StateLost, match=message):
            await resumed.exec("b")
        assert sandbox.ran == []


@scenario
async def test_reexecution_rebuilds_in_a_new_sandbox_and_compares(log: SandboxLog) -> None:
    first = await _begin(log, Recorder(), "a")
    await first.exec("b", env={"K": "v"})
    fresh = Recorder("two")
    resumed = await _resume(log, fresh, StateChoice.REEXECUTE)
    await resumed.exec("a")
    await resumed.exec("b", env={"K": "v"})
    assert fresh.ran == []
    assert (await resumed.exec("c")).stdout == b"c#1"
    assert fresh.ran == ["a", "b", "c"]
    dirty = Recorder("three")
    dirty.ran = ["a"]
    again = await _resume(log, dirty, StateChoice.REEXECUTE)
    for command, env in (("a", {}), ("b", {"K": "v"}), ("c", {})):
        await again.exec(command, env=env)
    with pytest.raises(ReplayMismatch) as caught:
        await again.exec("d")
    assert caught.value.field == "stdout, run again,"
    assert (caught.value.expected, caught.value.got) == (b"a#1", b"a#2")
    with pytest.raises(StateLost, match="already"):  # half re-executed is not new
        await again.exec("d")


@scenario
async def test_a_call_in_doubt_runs_in_the_rebuilt_state(log: SandboxLog) -> None:
    sandbox = Recorder()
    await _begin(log, sandbox, "a")
    await _leave_in_doubt(log, sandbox)
    fresh = Recorder("two")
    resumed = await _resume(log, fresh, StateChoice.REEXECUTE)
    await resumed.exec("a")
    assert (await resumed.exec("doubt")).stdout == b"doubt#1"
    assert fresh.ran == ["a", "doubt"]
    assert fresh.probed == [], "another instance knows nothing of it"


@scenario
async def test_a_found_result_is_part_of_what_is_rebuilt(log: SandboxLog) -> None:
    sandbox = Recorder(doubt=Probe(ProbeState.FINISHED, Result(End.EXITED, 0, stdout=b"doubt#1", stderr=b"e")))
    logged = await _begin(log, sandbox, "a")
    await logged.snapshot()
    await _leave_in_doubt(log, sandbox)
    resumed = await _resume(log, sandbox, StateChoice.SNAPSHOT)
    await resumed.exec("a")
    await resumed.exec("doubt")
    assert sandbox.ran == ["a", "doubt"], "restored, then the found command run in the restored state"


@scenario
async def test_shells_do_not_outlive_their_client(log: SandboxLog) -> None:
    sandbox = Recorder()
    logged = await _begin(log, sandbox, "a")
    await logged.shell("cd /x")
    resumed = await _resume(log, sandbox, StateChoice.REATTACH)
    await resumed.exec("a")
    await resumed.shell("cd /x")
    with pytest.raises(StateLost, match="shell 'main' died"):
        await resumed.shell("pwd")
    assert (await resumed.exec("b")).ok
    assert (await resumed.shell("pwd", session="other")).ok


# -- many


@scenario
async def test_a_thousand_sandboxes_in_one_process(log: SandboxLog) -> None:
    async def double(n: int) -> int:
        return 2 * n

    async def one(number: int) -> None:
        logged = await LoggedSandbox.open(log, f"s{number}", FunctionSandbox({"double": double}))
        for n in range(3):
            result = await logged.run(Call(Operation.CALL, {"name": "double", "arguments": {"n": number + n}}))
            assert result.stdout == str(2 * (number + n)).encode()

    await asyncio.gather(*(one(number) for number in range(1000)))
    assert log.verify().damage == []
    ends = log.sandboxes()
    assert (len(ends), {end.events for end in ends}) == (1000, {7})
    assert log.commits < 2000, "commits are shared across sandboxes"


# -- functions


@scenario
async def test_functions_return_raise_time_out_and_reject_bad_arguments(log: SandboxLog) -> None:
    async def forever() -> None:
        await asyncio.sleep(100)

    def stuck() -> None:
        import time

        time.sleep(0.5)

    def boom() -> None:
        raise ValueError("no \ud800")

    given: list[str] = []
    functions = {
        "add": lambda a, b: a + b,
        "raw": lambda: b"\xff",
        "table": lambda: {"b": 1, "a": [1.5]},
        "boom": boom,
        "forever": forever,
        "stuck": stuck,
        "pay": Function(lambda key: f"{given.append(key)}", exec_id_argument="key"),
    }
    logged = await LoggedSandbox.open(log, "a", FunctionSandbox(functions))

    async def call(name: str, timeout_s: float = 5.0, **arguments: Any) -> Result:
        return await logged.run(Call(Operation.CALL, {"name": name, "arguments": arguments}, timeout_s=timeout_s))

    assert (await call("add", a="x", b="y")).stdout == b"xy"
    assert (await call("raw")).stdout == b"\xff"
    assert (await call("table")).stdout == b'{"a": [1.5], "b": 1}'
    failed = await call("boom")
    assert (failed.exit_status, failed.stderr) == (1, b"ValueError: no \\ud800")
    assert (await call("add", a=1)).end is End.NOT_STARTED
    assert (await call("nothing")).end is End.NOT_STARTED
    assert (await call("forever", timeout_s=0.05)).end is End.TIMED_OUT
    await call("pay")
    assert given == [[e for e in log.events("a") if e.kind is Kind.INTENT][-1].body["exec_id"]]
    with pytest.raises(InDoubt, match="rerun"):
        await call("stuck", timeout_s=0.05)


def test_a_local_sandbox_survives_its_client_and_is_reattached(ground: Path, log: SandboxLog) -> None:
    async def main() -> None:
        first = await LoggedSandbox.open(log, "a", LocalSandbox(ground / "s"))
        await first.exec("echo one >file")
        await first.close()
        second = await LoggedSandbox.open(log, "a", LocalSandbox(ground / "s"), state=StateChoice.REATTACH)
        await second.exec("echo one >file")
        assert (await second.exec("cat file")).stdout == b"one\n"
        await second.close()
        elsewhere = await LoggedSandbox.open(log, "a", LocalSandbox(ground / "t"), state=StateChoice.REATTACH)
        await elsewhere.exec("echo one >file")
        await elsewhere.exec("cat file")
        with pytest.raises(StateLost):
            await elsewhere.exec("cat file")

    asyncio.run(main())
