"""Every error this package raises on purpose.

    SandboxError
    ├── BadCall (ValueError)             the call cannot be logged or run; nothing was logged, nothing ran
    ├── SandboxLogError
    │   ├── LogPoisoned                  an I/O error; this process writes nothing more to the log
    │   ├── LogDamaged                   the hash chain, an event or a blob is not what was written
    │   ├── LogFenced                    another writer took this sandbox over; this one must stop
    │   ├── LogInUse                     opened twice in one process, used after a fork, or while collecting
    │   ├── LogTooNew                    written by a newer format than this version reads
    │   ├── NetworkFileSystem            LMDB is unsafe there, and nobody said that it is wanted all the same
    │   └── UnknownSandbox (KeyError)    no such sandbox in this log
    ├── ReplayError
    │   ├── ReplayMismatch               the call is not the one that was logged at this point
    │   ├── ReplayExhausted              strict replay came to the end of the log
    │   └── StateLost                    the sandbox's state cannot be had the way the caller chose
    ├── InDoubt                          a command was dispatched and nobody knows what became of it
    ├── IsolationUnavailable             the isolation that was asked for cannot be had here
    ├── NotStarted                       a backend could not start a command, and is sure of it
    └── TransportLost                    the connection to a sandbox broke with a command under way

A message says three things: what happened, what follows from it, and what to do about it. `problem` builds one.

For a runner of rollouts, who knows none of these types, a class says what it means to one: `censor_reason` is why the
rollout ends; `stops_runner`: nothing is wrong with the rollout, but no call can be answered here any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


def problem(what: str, *, consequence: str, remedy: str) -> str:
    """The message of an error: what happened, what follows from it, what to do about it."""
    return f"{what.rstrip('.')}. {consequence.rstrip('.')}. {remedy.rstrip('.')}."


class SandboxError(Exception):
    """The root of every error that this package raises on purpose."""


class BadCall(SandboxError, ValueError):
    """A call that cannot be logged or run as it is. Nothing was logged and nothing ran."""


class SandboxLogError(SandboxError):
    """Something about the log on disk, or about its writers."""


class LogPoisoned(SandboxLogError):
    """A write or sync failed. What was acknowledged is safe; this process writes nothing more."""

    stops_runner: ClassVar = True


class LogDamaged(SandboxLogError):
    """Something that was acknowledged as durable is not what was written."""


class LogFenced(SandboxLogError):
    """Another writer took the sandbox over. Whatever this one still holds must not be acknowledged."""

    stops_runner: ClassVar = True


class LogInUse(SandboxLogError):
    """The log is open in this process already, was opened before a fork, or is being written to."""


class LogTooNew(SandboxLogError):
    """Written by a newer format than this version reads."""


class NetworkFileSystem(SandboxLogError):
    """The log would lie on a network file system, where LMDB's locks and memory map are not safe."""


class UnknownSandbox(SandboxLogError, KeyError):
    """A sandbox id that this log has never seen."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ReplayError(SandboxError):
    """Replay cannot go on."""


class ReplayMismatch(ReplayError):
    """The call differs from the logged one: the resumed rollout is not the rollout that was logged.

    Attributes:
        sequence: of the logged event that it was compared with.
        field: the first field that differs, such as "arguments.command".
        expected: the logged value.
        got: the caller's value, or what re-execution gave.
    """

    def __init__(self, sandbox_id: str, sequence: int, field: str, expected: Any, got: Any) -> None:
        super().__init__(
            problem(
                f"sandbox {sandbox_id!r}, event {sequence}: {field} is {_short(got)}, logged was {_short(expected)}",
                consequence="The answers in the log belong to another course of events, so none is given",
                remedy="Resume with the same tokens, tools and environment as the logged run, or begin a new sandbox",
            )
        )
        self.sandbox_id = sandbox_id
        self.sequence = sequence
        self.field = field
        self.expected = expected
        self.got = got


class ReplayExhausted(ReplayError):
    """Strict replay was asked for a call beyond the end of the log."""


class StateLost(ReplayError):
    """The file system or the processes that the log speaks of are gone, or cannot be proven to be there."""

    censor_reason: ClassVar = "state-lost"


class InDoubt(SandboxError):
    """A command was dispatched and no outcome is logged: it may have run, in part or whole, or never.

    Attributes:
        known: everything that is known: the intent's fields, what the probe said, which remedies were
            tried and why each did not apply.
    """

    censor_reason: ClassVar = "in-doubt"

    def __init__(self, sandbox_id: str, sequence: int, known: Mapping[str, Any]) -> None:
        tried = "; ".join(f"{name}: {why}" for name, why in dict(known.get("tried", {})).items())
        super().__init__(
            problem(
                f"sandbox {sandbox_id!r}, event {sequence}: {known.get('operation')} {_short(known.get('arguments'))}"
                f" was dispatched as {known.get('exec_id')} and its outcome is unknown ({tried or 'nothing tried'})",
                consequence="It was not run again, because that could do twice what may be done once",
                remedy="Find out by hand, then settle it with LoggedSandbox.record_lost(), restore a snapshot,"
                " or declare such calls idempotent",
            )
        )
        self.sandbox_id = sandbox_id
        self.sequence = sequence
        self.known = dict(known)


class IsolationUnavailable(SandboxError):
    """The isolation that was asked for cannot be had on this machine. Nothing was run without it."""


class NotStarted(SandboxError):
    """The backend could not start the command and is sure that no part of it ran."""


class TransportLost(SandboxError):
    """The connection to the sandbox broke while a command was under way."""


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
