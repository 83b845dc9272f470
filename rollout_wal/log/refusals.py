"""What a writer says when it refuses: one place for the wording."""

from __future__ import annotations

import os

from ..errors import BadInput, LogFenced, LogPoisoned, problem
from .format import MAX_PAYLOAD_BYTES


def refusal(error: BaseException | None, label: str, durable: int) -> Exception:
    """Why nothing is accepted: a fresh exception for each waiter, because a traceback belongs to one thread.

    `error` is what stopped the writer, None if it was closed; `label` names the log; `durable` is its durable LSN.
    """
    if isinstance(error, (LogFenced, LogPoisoned)):
        return type(error)(str(error))
    if error is None:
        return LogPoisoned(
            problem(
                f"the log {label} was closed",
                consequence="The record was not logged",
                remedy="Open the log again",
            )
        )
    return LogPoisoned(
        problem(
            f"the log {label} was poisoned by "
            f"{'an I/O error' if isinstance(error, OSError) else 'an interruption'}: {error!r}",
            consequence=f"Everything up to LSN {durable} is safe; nothing after it is acknowledged, "
            "and this writer accepts nothing more",
            remedy="Cure the disk (space, quota, device), then start the process again: "
            "it recovers everything that was acknowledged",
        )
    )


def forked(label: str) -> LogPoisoned:
    """A child process wanted to write its parent's log."""
    return LogPoisoned(
        problem(
            f"the log {label} belongs to process {os.getppid()}, from which this one was forked",
            consequence="Nothing was logged here, and the log itself is untouched",
            remedy="Open a log of its own in the child, or fork before the log is opened",
        )
    )


def too_long(length: int) -> BadInput:
    return BadInput(
        problem(
            f"a record of {length} bytes exceeds the format's limit of {MAX_PAYLOAD_BYTES}",
            consequence="It was not logged",
            remedy="Split it",
        )
    )


def unfit(frame_type: int, flags: int) -> BadInput:
    return BadInput(
        problem(
            f"record type {frame_type} with flags {flags:#x} does not fit into a frame",
            consequence="It was not logged",
            remedy="Use a type of 0..255 and flags of 16 bits",
        )
    )


def never_appended(lsn: int, last: int) -> BadInput:
    return BadInput(
        problem(
            f"LSN {lsn} was never appended; the last is {last}",
            consequence="Waiting for it would never end",
            remedy="Wait for an LSN that append returned",
        )
    )
