"""Where this package takes hold of SGLang, and the proof that it does.

SGLang's registry logs a hook that it cannot apply and goes on without it. A rollout would then be drawn by another
sampler and nobody would know. So each place is looked up before it is hooked, and afterwards our function must be in
the chain that a call goes through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import numpy as np

from ...errors import HookMoved, problem
from ..base import FinishReason
from ..common.support import Hook, check_hooks
from .rollouts import Rollouts
from .versions import NAME, installed

MODEL_RUNNER: Final = "sglang.srt.model_executor.model_runner:ModelRunner"
REQ: Final = "sglang.srt.managers.schedule_batch:Req"

ATTRIBUTE: Final = "rollout_wal"
"""Where SGLang's objects carry this package's state: `Rollouts` on a model runner, `Rollout` on a request."""


@dataclass(frozen=True, slots=True)
class Wrap:
    """One function of SGLang's, and what goes BEFORE, AFTER or AROUND it."""

    hook: Hook
    kind: str
    function: Callable[..., Any]


def sample(original: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    """AROUND ModelRunner.sample: the rollouts of the batch are drawn here, all else by SGLang."""
    rollouts: Rollouts | None = getattr(runner, ATTRIBUTE, None)
    if rollouts is None or not rollouts.by_rid:
        return original(runner, logits_output, forward_batch)
    rids = forward_batch.rids
    length_B = forward_batch.seq_lens[: len(rids)].cpu().numpy().astype(np.int64)
    # Before the original: it changes the logits in place.
    drawn = rollouts.draw(rids, length_B, forward_batch.forward_mode.is_extend(), logits_output.next_token_logits)
    tokens = original(runner, logits_output, forward_batch)
    if drawn is not None:
        tokens[drawn[:, 0]] = drawn[:, 1].to(tokens.dtype)
        if forward_batch.return_logprob:
            for row in drawn[:, 0].tolist():
                last = rollouts.by_rid[rids[row]].drawn[-1]
                logits_output.next_token_logprobs[row] = last.logprob
    return tokens


def update_finish_state(original: Callable[..., Any], req: Any, new_accepted_len: int = 1) -> None:
    """AROUND Req.update_finish_state: a rollout ends where the project's finish predicate says.

    SGLang's own differs: ignoring the end of sequence makes it ignore stop tokens too, and it stops at end-of-sequence
    tokens that only the tokenizer knows.
    """
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH, FINISH_MATCHED_TOKEN

    rollout = getattr(req, ATTRIBUTE, None)
    if rollout is None or req.finished() or req.to_finish:
        original(req, new_accepted_len)
        return
    params = req.sampling_params
    if (params.stop_strs or params.stop_regex_strs) and req._check_str_based_finish(new_accepted_len):
        return
    reason = rollout.finish()
    if reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
        req.finished_reason = FINISH_MATCHED_TOKEN(matched=req.output_ids[-1])
    elif reason is not FinishReason.RUNNING:
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
    if reason is not FinishReason.RUNNING:
        req.finished_len = len(req.output_ids)


SAMPLING: Final = (
    Wrap(Hook(f"{MODEL_RUNNER}.sample", ("self", "logits_output", "forward_batch")), "AROUND", sample),
    Wrap(Hook(f"{REQ}.update_finish_state", ("self", "new_accepted_len")), "AROUND", update_finish_state),
)
"""What drawing a rollout's tokens needs, in whichever process the model runs."""


def install(wraps: Iterable[Wrap], others: Iterable[Hook] = ()) -> None:
    """Register and apply what is not yet in force, and make sure that it then is.

    Args:
        others: what this package calls or overrides besides.

    Raises:
        HookMoved: a place that is gone or takes other parameters, or a hook that SGLang did not apply.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    wanted = [wrap for wrap in wraps if not in_force(wrap)]
    check_hooks(NAME, installed(), [*(wrap.hook for wrap in wanted), *others])
    for wrap in wanted:
        HookRegistry.register(wrap.hook.path.replace(":", "."), wrap.function, HookType[wrap.kind])
    HookRegistry.apply_hooks()
    check_in_force(wanted)


def check_in_force(wraps: Iterable[Wrap]) -> None:
    """Raises HookMoved where a call would not reach our function."""
    if missing := [wrap.hook.path for wrap in wraps if not in_force(wrap)]:
        raise HookMoved(
            problem(
                f"SGLang {installed()} has not applied the hooks {missing}; its log says why",
                consequence="Nothing was started: rollouts would be drawn or shown without the log knowing",
                remedy="Remove other plug-ins that replace these functions; if there are none, report this",
            )
        )


def in_force(wrap: Wrap) -> bool:
    """Whether our function is in the chain of wrappers that a call goes through."""
    module, _, attributes = wrap.hook.path.partition(":")
    function: Any = import_module(module)
    for name in attributes.split("."):
        function = inspect.getattr_static(function, name, None)
    while function is not None:
        if any(cell.cell_contents is wrap.function for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
