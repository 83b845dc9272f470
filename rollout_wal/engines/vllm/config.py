"""How the log inside vLLM is configured, and which configurations of vLLM are refused."""

from __future__ import annotations

import operator
import os
from typing import Any, Final, Literal, cast

from ...errors import BadInput, problem
from ...log.policy import SyncPolicy
from .processor import PositionNoise

_CONFIG: Final = "rollout_wal"
_ENVIRONMENT: Final = "ROLLOUT_WAL_VLLM_LOG"
_OPTIONS: Final = frozenset({"log", "policy_version", "weights_digest", "segment_bytes", "keep", "policy", "take_over"})


def options_of(vllm_config: Any) -> dict[str, Any]:
    """The log's options, `policy_version` and `policy` ready for use; see `scheduler.LoggingScheduler`.

    Raises:
        BadInput: no log directory, options that this version does not know, or values that they cannot have.
    """
    extra = vllm_config.additional_config
    options: dict[str, Any] = dict(extra.get(_CONFIG, {})) if isinstance(extra, dict) else {}
    options.setdefault("log", os.environ.get(_ENVIRONMENT))
    unknown = sorted(set(options) - _OPTIONS)
    if not options["log"] or unknown:
        raise BadInput(
            problem(
                f"unknown options {unknown}" if unknown else "no log directory is configured",
                consequence="vLLM was not started",
                remedy=f'Pass additional_config={{"{_CONFIG}": {{"log": DIRECTORY}}}}; options: {sorted(_OPTIONS)}',
            )
        )
    try:
        options["policy_version"] = _version_of(options.get("policy_version", 0))
        options["policy"] = _policy_of(**options.get("policy", {}))
    except (TypeError, ValueError) as error:
        raise BadInput(
            problem(
                f"the options of the log have values that they cannot have: {error}",
                consequence="vLLM was not started",
                remedy='policy_version is a number, and policy is {"kind": "step" | "group", "group_ms": number, '
                '"group_bytes": number} or a part of that',
            )
        ) from error
    return options


def _version_of(version: Any) -> int:
    number = operator.index(version)
    if number < 0:
        raise ValueError(f"policy_version={number}")
    return number


def _policy_of(kind: str = "step", **more: Any) -> SyncPolicy:
    if kind not in ("step", "group"):
        raise ValueError(f"policy kind {kind!r}")
    return SyncPolicy(cast(Literal["step", "group"], kind), **more)


def check_config(vllm_config: Any) -> None:
    """Raises BadInput: a configuration under which tokens would not be drawn by position."""
    faults = []
    processors = vllm_config.model_config.logits_processors or []
    name = f"{PositionNoise.__module__}:{PositionNoise.__qualname__}"
    if not any(p is PositionNoise or p == name for p in processors):
        faults.append(f"the sampler is missing: pass logits_processors=[{name!r}]")
    if vllm_config.speculative_config is not None:
        faults.append("speculative decoding draws several tokens at a position")
    if vllm_config.model_config.logprobs_mode != "raw_logprobs":
        faults.append(f"logprobs_mode={vllm_config.model_config.logprobs_mode}: the log holds raw_logprobs")
    if faults:
        raise BadInput(
            problem(
                f"rollouts cannot be logged with this configuration of vLLM: {'; '.join(faults)}",
                consequence="vLLM was not started",
                remedy="Change what is named; docs/vllm.md has a command line that works",
            )
        )
