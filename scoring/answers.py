"""What goes out to whoever waits: scores that were held against their item, or the error that says why not."""

from __future__ import annotations

import logging
from dataclasses import replace

from rollout_wal.dataset import tokens_crc32c
from rollout_wal.errors import RolloutWalError

from .cache import ScoreCache
from .errors import BadResult, SchedulerFailed, TeacherFailed, problem
from .items import ScoreItem, Scores
from .teachers.base import Teacher

log = logging.getLogger(__name__)


def from_cache(cache: ScoreCache, key: str, item: ScoreItem) -> Scores | None:
    """What the cache has for an item, held against it like any other answer."""
    found = cache.get(key)
    if found is None:
        return None
    scores = answer_for(item, found)
    try:
        scores.check_against(item)
    except RolloutWalError as error:
        log.error("cached scores are not usable", extra={"key": key, "error": str(error)})
        return None
    return scores


def answer_for(item: ScoreItem, scores: Scores) -> Scores:
    """Scores as the answer to an item that reads the same, though its rollout may differ elsewhere."""
    return replace(scores, span=item.span, tokens_crc32c=tokens_crc32c(item.token_ids))


def checked(teacher: Teacher, item: ScoreItem, outcome: Scores | Exception) -> Scores | Exception:
    """Whatever a teacher gives out is held against the item before anybody sees it, or a disk."""
    if isinstance(outcome, RolloutWalError):
        return outcome
    if isinstance(outcome, Exception):
        return unknown_failure(teacher, outcome)
    try:
        outcome.check_against(item)
    except RolloutWalError as error:
        return TeacherFailed(str(error)) if isinstance(error, BadResult) else error
    return outcome


def unknown_failure(teacher: Teacher, error: Exception) -> TeacherFailed:
    log.error("teacher failed", extra={"teacher": teacher.info.id, "error": repr(error)})
    return TeacherFailed(
        problem(
            f"teacher {teacher.info.id!r} failed: {type(error).__name__}: {error}",
            consequence="The item fails; other items are not affected",
            remedy="If memory ran out, lower the token budget or chunk; otherwise see the server's log",
        )
    )


def broken(error: BaseException) -> SchedulerFailed:
    return SchedulerFailed(
        problem(
            f"the server's scheduler failed: {type(error).__name__}: {error}",
            consequence="What it had accepted is not answered, and nothing is accepted any more",
            remedy="Send the items to another server; restart this one, and report the defect with its log",
        )
    )


def stopped() -> SchedulerFailed:
    return SchedulerFailed(
        problem(
            "the server stopped",
            consequence="The item is not answered",
            remedy="Send it to another server, or to this one when it is back",
        )
    )
