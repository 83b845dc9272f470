"""The end of writing: what the first error of a write or sync leaves behind, for all who write to one log.

After a failed sync nobody can say what is on the disk, and trying again may report success for pages that were dropped.
So it is not only the call that met the error which fails: nothing is written any more, by nobody in this process.
"""

from __future__ import annotations

from .errors import LogPoisoned, problem


class Poison:
    """Shared by the committer and the blob store of a log. Safe to use from many threads."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        """The first error; None as long as all is well."""

    def check(self) -> None:
        """Raises:
        LogPoisoned: there was an error before.
        """
        if self.failure is not None:
            raise poisoned(self.failure)

    def spread(self, error: BaseException) -> LogPoisoned:
        """Poison the log with this error, if none has before. Returns what every waiter gets."""
        if self.failure is None:
            self.failure = error
        return poisoned(self.failure)


def poisoned(cause: BaseException) -> LogPoisoned:
    """What a caller gets who comes too late, or whose own write failed."""
    error = LogPoisoned(
        problem(
            f"the sandbox log cannot be written any more: {cause!r}",
            consequence="What was acknowledged is safe; this call was not acknowledged, and nothing more is accepted",
            remedy="Cure the cause (a full disk, a failing device), then open the log in a new process",
        )
    )
    error.__cause__ = cause
    return error
