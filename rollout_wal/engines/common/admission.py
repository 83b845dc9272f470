"""What an engine refuses before a request changes anything."""

from __future__ import annotations

import numpy as np

from ...errors import BadInput, BadPrompt, BadSampling, problem
from ...finish import finish_reason
from ..base import EngineInfo, FinishReason, Request

_REFUSED = "The request was not added"


def check_request(request: Request, info: EngineInfo) -> None:
    """Whether this engine can run a request at all.

    Raises:
        BadPrompt: empty, token ids out of the vocabulary, or no room in the context.
        BadSampling: a noise key or stop tokens out of range.
        BadInput: a slot out of range, flags that do not match the prefix, or a prefix that already ends the rollout.
    """
    slot = request.slot
    if not 0 <= slot <= 0xFFFF:
        raise BadInput(problem(f"slot {slot} is not in 0..65535", consequence=_REFUSED, remedy="Use a 16-bit slot"))
    if len(request.prefix) != len(request.prefix_sampled):
        raise BadInput(
            problem(
                f"slot {slot}: {len(request.prefix)} prefix tokens but {len(request.prefix_sampled)} flags",
                consequence=_REFUSED,
                remedy="Pass one prefix_sampled flag per prefix token",
            )
        )
    if not 0 <= request.noise_key < 1 << 64:
        raise BadSampling(
            problem(
                f"slot {slot}: noise key {request.noise_key} is not an unsigned 64-bit number",
                consequence=_REFUSED,
                remedy="Reduce it modulo 2**64 where the seed is made",
            )
        )
    _check_tokens(request, info.vocab_size)
    _check_not_over(request, info)


def check_slot(slot: int, *, used: bool) -> None:
    """Raises BadInput: another request has this slot."""
    if used:
        raise BadInput(
            problem(
                f"slot {slot} is already in use",
                consequence=_REFUSED,
                remedy="Wait until it finishes, or abort it first",
            )
        )


def _check_tokens(request: Request, vocab_size: int) -> None:
    if not len(request.prompt):
        raise BadPrompt(
            problem(
                f"slot {request.slot}: the prompt is empty",
                consequence=_REFUSED,
                remedy="Pass at least one token, such as the beginning-of-sequence token",
            )
        )
    for name, ids in (("prompt", request.prompt), ("prefix", request.prefix)):
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            at = int(outside[0])
            raise BadPrompt(
                problem(
                    f"slot {request.slot}: {name} token {int(ids[at])} at index {at} is outside of the vocabulary, "
                    f"0..{vocab_size - 1}",
                    consequence=_REFUSED,
                    remedy="Tokenise with this model's tokenizer",
                )
            )
    if stops := [t for t in request.sampling.stop_token_ids if t >= vocab_size]:
        raise BadSampling(
            problem(
                f"slot {request.slot}: stop tokens {stops} are outside of the vocabulary, 0..{vocab_size - 1}",
                consequence=_REFUSED + "; it could never stop there",
                remedy="Take stop tokens from this model's tokenizer",
            )
        )


def _check_not_over(request: Request, info: EngineInfo) -> None:
    length = len(request.prompt) + len(request.prefix)
    sampled = int(np.count_nonzero(request.prefix_sampled))
    if length >= info.max_context and not sampled:
        raise BadPrompt(
            problem(
                f"slot {request.slot}: {length} tokens leave no room for one more in the model's context of "
                f"{info.max_context}",
                consequence=_REFUSED,
                remedy="Shorten the prompt, or use a model with a longer context",
            )
        )
    ends_sampled = len(request.prefix) > 0 and bool(request.prefix_sampled[-1])
    reason = finish_reason(
        int(request.prefix[-1]) if ends_sampled else None,
        sampled=sampled,
        length=length,
        sampling=request.sampling,
        eos_token_ids=info.eos_token_ids,
        max_context=info.max_context,
    )
    if reason is not FinishReason.RUNNING:
        raise BadInput(
            problem(
                f"slot {request.slot}: its prefix already ends the rollout ({reason.name})",
                consequence=_REFUSED + "; decoding it further would run past its end",
                remedy="Finish it with this reason: ask finish_reason before resuming anything",
            )
        )
