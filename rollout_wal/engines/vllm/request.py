"""What a client of a logging vLLM may ask for beside a rollout id, which `common.spec` explains.

The keys are those of `SamplingParams.extra_args`; `vllm serve` takes them as `vllm_xargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...params import SamplingParams
from ..common import spec
from ..common.spec import RolloutSpec, named, noise_key, rollout_id

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmParams

__all__ = ["RolloutSpec", "limits_of", "named", "noise_key", "rollout_id", "sampling_of", "spec_of", "validate"]

_REFUSED: Final = {
    "structured_outputs": "its grammar's state is not restored on resume",
    "thinking_token_budget": "what was spent of it is not restored on resume",
    "repetition_detection": "it looks at the output since the last resume alone",
    "prompt_logprobs": "after a resume the prompt holds output; ask for them in a request without a rollout",
    "trace_decode_token_ids": "it replays tokens instead of sampling them",
}


def spec_of(params: VllmParams) -> RolloutSpec | None:
    """What a request says, or None if it names no rollout. Validated by `validate` before."""
    return spec.spec_of(params.extra_args or {})


def validate(params: VllmParams) -> None:
    """Refuse what cannot be right on a resume, in vLLM's front end, where the client is told.

    Raises:
        ValueError: names the parameter and the reason.
    """
    extra: Mapping[str, Any] = params.extra_args or {}
    if not spec.check_spec(extra, own=("rollout_wal_plan",)):
        return
    if params.n != 1:
        raise ValueError(
            spec.not_accepted(
                f"n={params.n} with a rollout id, and each completion is a rollout",
                "Send a request for each, with an id of its own",
            )
        )
    for field, why in _REFUSED.items():
        if getattr(params, field, None) not in (None, []):
            raise ValueError(
                spec.not_accepted(
                    f"{field} cannot be combined with a rollout id: {why}",
                    f"Leave {field} out, or leave the id out and do without the log",
                )
            )


def limits_of(params: VllmParams) -> dict[str, Any]:
    """What changes the distribution beside the project's own parameters; empty for most requests."""
    return {
        name: value
        for name, value in (
            ("logit_bias", sorted((params.logit_bias or {}).items())),
            ("allowed_token_ids", sorted(params.allowed_token_ids or ())),
            ("bad_words", sorted(params.bad_words or ())),
        )
        if value
    }


def sampling_of(params: VllmParams) -> SamplingParams:
    """vLLM's parameters as the project's. They mean the same."""
    return SamplingParams(
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        min_p=params.min_p,
        max_tokens=params.max_tokens or 1,
        min_tokens=min(params.min_tokens, params.max_tokens or 1),
        stop_token_ids=tuple(params.stop_token_ids or ()),
        ignore_eos=params.ignore_eos,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
