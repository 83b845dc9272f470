"""Whose tokens these are (I6): what a job's log says of its model, beside what an engine or a caller says now.

A mismatch names both values. The weights' digest is not part of the engine's record: it changes with every policy
version, and is in that version's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .engines.base import EngineInfo
from .errors import ArchitectureMismatch, BadInput, TokenizerMismatch, UndeclaredWeights, problem
from .records import Policy


def engine_record(info: EngineInfo) -> dict[str, Any]:
    """What is logged of an engine, as plain types."""
    plain = {**asdict(info), "eos_token_ids": list(info.eos_token_ids), "extras": dict(info.extras)}
    plain.pop("weights_digest")
    return plain


def check_engine(info: EngineInfo, logged: Mapping[str, Any] | None, policy: Policy | None) -> None:
    """Whether an engine may go on with a job.

    Args:
        logged: the job's engine record. policy: the version in force. None in a new job.

    Raises:
        ArchitectureMismatch, TokenizerMismatch: the log holds rollouts of another model.
        UndeclaredWeights: these are not the weights of the logged policy version.
    """
    if logged is not None:
        _same("architecture", logged["architecture_digest"], info.architecture_digest, ArchitectureMismatch)
        _same("tokenizer", logged["tokenizer_digest"], info.tokenizer_digest, TokenizerMismatch)
        _same("chat template", logged["chat_template_digest"], info.chat_template_digest, TokenizerMismatch)
    if policy is not None and policy.weights_digest != info.weights_digest:
        raise UndeclaredWeights(
            problem(
                f"the engine's weights have digest {info.weights_digest}, but policy version {policy.version} "
                f"was logged with {policy.weights_digest}" + (f" from {policy.source}" if policy.source else ""),
                consequence="Tokens would be attributed to weights that did not produce them, so nothing was begun",
                remedy="Bring the logged weights back; new ones are declared with update_weights(..., version), "
                "while the logged ones are in force",
            )
        )


def check_follows(version: int, policy: Policy | None, *, same: bool = False) -> None:
    """Whether a policy version may come next. `same`: the one in force may be named again.

    Raises:
        BadInput: it does not follow the logged one.
    """
    if policy is None or version > policy.version or (same and version == policy.version):
        return
    raise BadInput(
        problem(
            f"policy version {version} does not follow the logged version {policy.version}",
            consequence="The weights were not changed",
            remedy=f"Pass a version of {policy.version + 1} or later",
        )
    )


def _same(what: str, logged: str, now: str, error: type[ArchitectureMismatch | TokenizerMismatch]) -> None:
    if logged != now:
        raise error(
            problem(
                f"the log was written with {what} {logged}, but this engine has {now}",
                consequence="Resumed rollouts would mix two models, so nothing was begun",
                remedy="Use the model that the log was begun with, or begin a new log directory",
            )
        )
