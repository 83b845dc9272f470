"""What is logged of a rollout becomes a request's own output, and ends it where it had ended."""

from __future__ import annotations

from array import array
from typing import Any

from ..base import FinishReason
from .member import Found
from .rollouts import Rollout


def give_output(req: Any, found: Found) -> None:
    """As after a retraction: output that the request has already, and that is prefilled with its prompt."""
    from sglang.srt.utils.weight_versions import WeightVersionEvent

    count = len(found.tokens)
    req.output_ids = array("q", found.tokens)
    ends = [at for at in range(1, count) if found.versions[at] != found.versions[at - 1]]
    req.weight_version_events = [
        WeightVersionEvent(old_version=str(found.versions[at - 1]), num_output_tokens=at) for at in [*ends, count]
    ]
    if req.return_logprob:
        # Of the sampled tokens only: SGLang expects those of its input just when it prefills nothing but a prompt.
        req.logprob_start_len = -1
        req.logprob.output_token_logprobs_val = list(found.logprobs)
        req.logprob.output_token_logprobs_idx = list(found.tokens)


def end(req: Any, reason: FinishReason) -> None:
    """It had ended before, for this reason: a request that SGLang takes for finished, without a forward pass."""
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH, FINISH_MATCHED_STR, FINISH_MATCHED_TOKEN

    if reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
        req.finished_reason = FINISH_MATCHED_TOKEN(matched=req.output_ids[-1])
    elif reason is FinishReason.STOP_STRING:
        if not req._check_str_based_finish(1):  # which one it was: found again in the text
            req.finished_reason = FINISH_MATCHED_STR(matched="")
    else:
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
    req.finished_len = len(req.output_ids)
    if req.return_logprob and req.logprob.input_token_logprobs_val is None:
        req.logprob.input_token_logprobs_val, req.logprob.input_token_logprobs_idx = [], []


def finish_of(req: Any, rollout: Rollout) -> FinishReason:
    """The other way round: what SGLang's reason is in the log."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_MATCHED_STR, FINISHED_MATCHED_REGEX

    if not req.finished() or isinstance(req.finished_reason, FINISH_ABORT):
        return FinishReason.RUNNING  # an abort is an interruption, never a finish
    if isinstance(req.finished_reason, (FINISH_MATCHED_STR, FINISHED_MATCHED_REGEX)):
        return FinishReason.STOP_STRING
    return rollout.finish()
