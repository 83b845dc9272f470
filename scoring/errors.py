"""Every error this package raises on purpose.

    RolloutWalError
    ├── ScoringError
    │   ├── BadRequest (ValueError)     a request that no server can score; retrying changes nothing
    │   ├── MessageTooLarge             larger than the server takes; retrying changes nothing
    │   ├── Overloaded                  the server has too much queued; says when to come back
    │   ├── DeadlinePassed              the time the caller gave ran out before the work was done
    │   ├── Unreachable                 no server that may answer does, after all retries
    │   ├── TeacherFailed               a teacher cannot be loaded, or computes something that is no score
    │   ├── SchedulerFailed             the server broke; nothing is known to be wrong with the item
    │   ├── BadResult                   an answer that does not fit what was asked; never stored
    │   └── BadConfiguration (ValueError)
    └── ProvenanceError
        └── ScoreProvenanceMismatch     other tokens, weights, tokenizer, template or precision than expected

A message says three things: what happened, what follows from it, and what to do about it.
"""

from __future__ import annotations

from rollout_wal.errors import ProvenanceError, RolloutWalError, problem

__all__ = [
    "BadConfiguration",
    "BadRequest",
    "BadResult",
    "DeadlinePassed",
    "MessageTooLarge",
    "Overloaded",
    "SchedulerFailed",
    "ScoreProvenanceMismatch",
    "ScoringError",
    "TeacherFailed",
    "Unreachable",
    "problem",
]


class ScoringError(RolloutWalError):
    """Something about scoring rollouts under a teacher."""


class BadRequest(ScoringError, ValueError):
    """A request that cannot be scored as it is. Nothing was computed."""


class MessageTooLarge(ScoringError):
    """A message above the limit of the one who would receive it. Nothing was computed; make it smaller."""


class Overloaded(ScoringError):
    """The server has as much queued as it accepts. Nothing was computed; come back after the delay."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlinePassed(ScoringError):
    """The caller's time ran out. The result, if it is computed all the same, goes nowhere but into the cache."""


class Unreachable(ScoringError):
    """No server that may answer this request can be reached."""


class TeacherFailed(ScoringError):
    """A teacher that cannot be loaded, or whose output is not a number."""


class SchedulerFailed(ScoringError):
    """The server's scheduler ended by a defect of its own. Its items are unanswered; send them elsewhere."""


class BadResult(ScoringError):
    """An answer that is cut short, does not decode, or does not fit the request. It was dropped."""


class BadConfiguration(ScoringError, ValueError):
    """A configuration that no server can be started from."""


class ScoreProvenanceMismatch(ProvenanceError):
    """A score would have been attributed to a teacher, or tokens, that it does not come from."""


def mismatch(what: str, found: object, expected: object) -> ScoreProvenanceMismatch:
    """The error for two values that had to be equal; it names both."""
    return ScoreProvenanceMismatch(
        problem(
            f"{what} is {found!r}, but {expected!r} was expected",
            consequence="No score was returned or stored",
            remedy="Score with the teacher and tokens that the request names, or correct what it expects",
        )
    )
