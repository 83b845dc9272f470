"""Calls and results as they stand in the log, and how a new call is compared with a logged one."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadCall, LogDamaged, ReplayMismatch, problem
from .events import BlobRef, Effect, End, Event, Kind, canonical, digest_of, payload_from_plain, payload_to_plain
from .log import SandboxLog
from .sandbox import Call, Operation, Result

#: The fields of an intent in which a replayed call must agree with it, in the order of comparison. The attempt is
#: not among them: a resumed rollout makes the same calls in a later attempt.
COMPARED = (
    "operation",
    "arguments",
    "cwd",
    "env_names",
    "env_digest",
    "timeout_s",
    "idempotent",
    "rollout_id",
    "position",
)


@dataclass(frozen=True, slots=True)
class Cause:
    """What a call comes from: the causal link into the token log.

    Args:
        rollout_id: of the rollout whose tokens asked for it.
        position: of the last token of the request, as an index into prompt and output; None if there is none.
        attempt: of the rollout.
    """

    rollout_id: str | None = None
    position: int | None = None
    attempt: int | None = None


NO_CAUSE = Cause()


@dataclass(slots=True)
class Step:
    """One call as the log has it.

    Args:
        intent: its intent.
        dispatches: (exec id, instance of the sandbox) of the intent and of each retry.
        outcome: None while it is in doubt.
        call: as the caller repeated it in this process; the log holds no values of environment variables.
    """

    intent: Event
    dispatches: list[tuple[str, str]]
    outcome: Event | None = None
    call: Call | None = None


@dataclass(slots=True)
class History:
    """A sandbox's chain, sorted into what replay needs."""

    header: Event
    steps: list[Step] = field(default_factory=list)
    snapshots: list[tuple[int, str]] = field(default_factory=list)
    """(number of steps before it, name) of each snapshot."""
    instances: list[str] = field(default_factory=list)
    """Every instance of the sandbox that commands were or may have been sent to, in order."""
    rebuilding: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """By instance, (choice, snapshot) of a rebuild of the state that began in it and has not come to its end: it is in
    no state that the events speak of."""

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """Raises:
        LogDamaged: events that do not follow each other as `events` says.
        """
        iterator = iter(events)
        history = cls(header=next(iterator))
        history.instances.append(history.header.body["instance"])
        collecting = gc.isenabled()
        gc.disable()  # all that is made here stays; looking for garbage in it would take a third of the time
        try:
            for event in iterator:
                history.add(event)
        finally:
            if collecting:
                gc.enable()
        return history

    @property
    def pending(self) -> Step | None:
        """The last step, if it is in doubt."""
        return self.steps[-1] if self.steps and self.steps[-1].outcome is None else None

    def add(self, event: Event) -> None:
        """Take in the next event of the chain."""
        body, pending = event.body, self.pending
        fits = (pending is None) == (event.kind not in (Kind.RETRY, Kind.OUTCOME)) or event.kind is Kind.STATE
        if event.kind is Kind.HEADER or not fits:
            raise LogDamaged(
                problem(
                    f"event {event.sequence} is {event.kind}, which cannot follow the events before it",
                    consequence="The sandbox's history after it cannot be understood",
                    remedy="Restore the log from a copy",
                )
            )
        if event.kind is Kind.INTENT:
            self.steps.append(Step(event, [(body["exec_id"], body["instance"])]))
        elif pending is not None and event.kind is Kind.RETRY:
            pending.dispatches.append((body["exec_id"], body["instance"]))
        elif pending is not None and event.kind is Kind.OUTCOME:
            pending.outcome = event
        elif event.kind is Kind.SNAPSHOT:
            self.snapshots.append((len(self.steps), body["name"]))
        elif event.kind is Kind.STATE:
            instance, which = body["instance"], (body["choice"], body["snapshot"])
            if body["phase"] == "begun":
                self.rebuilding[instance] = which
            elif self.rebuilding.get(instance) == which:  # one that was only reattached is as it was
                del self.rebuilding[instance]
        if "instance" in body and body["instance"] != self.instances[-1]:
            self.instances.append(body["instance"])


#: The arguments that an operation must have, and that are text.
_TEXT_ARGUMENTS = {
    Operation.EXEC: ("command",),
    Operation.SHELL: ("session", "command"),
    Operation.READ_FILE: ("path",),
    Operation.WRITE_FILE: ("path",),
    Operation.CALL: ("name",),
}


def intent_body(call: Call, cause: Cause, salt: bytes) -> dict[str, Any]:
    """The fields of an intent but for its exec id and instance.

    Raises:
        BadCall: a call that cannot be logged.
    """
    if not 0 < call.timeout_s < 1e9:  # NaN too
        raise BadCall(
            problem(
                f"timeout_s={call.timeout_s!r} is not a positive number of seconds",
                consequence="Nothing was logged and nothing ran",
                remedy="Every call needs a time after which it is killed",
            )
        )
    for name in _TEXT_ARGUMENTS[call.operation]:
        value = call.arguments.get(name)
        if not isinstance(value, str) or "\0" in value:
            raise BadCall(
                problem(
                    f"{call.operation} needs the argument {name!r} as text without NUL, not {value!r:.100}",
                    consequence="Nothing was logged and nothing ran",
                    remedy=f"Pass {', '.join(_TEXT_ARGUMENTS[call.operation])}",
                )
            )
    body = {
        "operation": Operation(call.operation).value,
        "arguments": call.arguments,
        "stdin": call.stdin,
        "cwd": call.cwd,
        "env_names": sorted(call.env),
        "env_digest": _env_digest(call.env, salt),
        "timeout_s": float(call.timeout_s),
        "idempotent": call.idempotent,
        "rollout_id": cause.rollout_id,
        "position": cause.position,
        "attempt": cause.attempt,
    }
    # Here, and not only when it is logged: a resumed rollout makes the call again, and must hear the same before it is
    # compared with one that is in the log.
    canonical({name: value for name, value in body.items() if name != "stdin"})
    return body


def compare(sandbox_id: str, logged: Event, body: Mapping[str, Any]) -> None:
    """Raises:
    ReplayMismatch: the first field in which a call differs from the logged intent.
    """
    for name in COMPARED:
        expected, got = logged.body[name], body[name]
        if not _same(expected, got):
            if isinstance(expected, Mapping) and isinstance(got, Mapping):
                for key in sorted({*expected, *got}):
                    if not _same(expected.get(key), got.get(key)):
                        name, expected, got = f"{name}.{key}", expected.get(key), got.get(key)  # noqa: PLW2901
                        break
            raise ReplayMismatch(sandbox_id, logged.sequence, name, expected, got)
    stdin = payload_from_plain(logged.body["stdin"])
    if isinstance(stdin, BlobRef):
        same = stdin.size == len(body["stdin"]) and stdin.digest == digest_of(body["stdin"])
    else:
        same = stdin == body["stdin"]
    if not same:
        raise ReplayMismatch(sandbox_id, logged.sequence, "stdin", stdin, body["stdin"])


def _same(a: Any, b: Any) -> bool:
    """As the log sees it: not by ==, for which True is 1 and, deep down, NaN is not NaN."""
    if isinstance(a, dict | list | float) or type(a) is not type(b):
        return canonical(a) == canonical(b)
    return bool(a == b)


def call_of(log: SandboxLog, intent: Event) -> Call | None:
    """The call that an intent logged; None if it had environment variables, whose values are not in the log."""
    body = intent.body
    if body["env_names"]:
        return None
    return Call(
        operation=Operation(body["operation"]),
        arguments=body["arguments"],
        stdin=log.load(payload_from_plain(body["stdin"])),
        cwd=body["cwd"],
        timeout_s=body["timeout_s"],
        idempotent=body["idempotent"],
    )


def outcome_body(log: SandboxLog, intent: int, result: Result, via: str) -> dict[str, Any]:
    """The fields of an outcome. Large outputs are durable as blobs when this returns.

    Args:
        intent: sequence of the intent that it settles.
        via: how the result was had: "run", "probe", "retry" or "given up".
    """
    effects = result.effects
    return {
        "intent": intent,
        "via": via,
        "end": result.end,
        "exit_status": result.exit_status,
        "signal": result.signal,
        "stdout": payload_to_plain(log.store(result.stdout)),
        "stderr": payload_to_plain(log.store(result.stderr)),
        "stdout_bytes": len(result.stdout),
        "stderr_bytes": len(result.stderr),
        "duration_s": float(result.duration_s),
        "effects": None if effects is None else [_effect_map(effect) for effect in effects],
        "notes": list(result.notes),
    }


def result_of(log: SandboxLog, outcome: Event) -> Result:
    """The result that an outcome logged.

    Raises:
        LogDamaged: its output is a blob that cannot be read back.
    """
    body = outcome.body
    return Result(
        end=End(body["end"]),
        exit_status=body["exit_status"],
        signal=body["signal"],
        stdout=log.load(payload_from_plain(body["stdout"])),
        stderr=log.load(payload_from_plain(body["stderr"])),
        duration_s=body["duration_s"],
        effects=effects_of(outcome),
        notes=tuple(body["notes"]),
    )


def difference(logged: Result, got: Result) -> tuple[str, Any, Any] | None:
    """The first field in which a command that was run again differs from what is logged: name, logged, got."""
    names = ["end", "exit_status", "stdout", "stderr"]
    if logged.end in (End.TIMED_OUT, End.OUTPUT_LIMIT):
        names = ["end"]  # how far a command came before it was killed depends on the clock
    for name in names:
        if getattr(logged, name) != getattr(got, name):
            return name, getattr(logged, name), getattr(got, name)
    return None


def effects_of(outcome: Event) -> tuple[Effect, ...] | None:
    """What a command changed, where it was recorded."""
    raw = outcome.body["effects"]
    return None if raw is None else tuple(Effect(**item) for item in raw)


def _effect_map(effect: Effect) -> dict[str, Any]:
    path = effect.path.encode("utf-8", "backslashreplace").decode()  # a name need not be UTF-8; the log is
    return {"path": path, "change": effect.change, "size": effect.size, "digest": effect.digest}


def _env_digest(env: Mapping[str, str], salt: bytes) -> bytes:
    """Keyed with the sandbox's own salt, so that equal secrets in two logs do not show as equal."""
    if not env:
        return b""
    return hashlib.blake2b(canonical(env), digest_size=32, key=salt).digest()
