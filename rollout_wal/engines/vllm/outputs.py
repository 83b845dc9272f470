"""vLLM's outputs: of one request, and several sets of them as one."""

from __future__ import annotations

from typing import Final

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine import FinishReason as VllmFinish

from ..base import FinishReason

Outputs = dict[int, EngineCoreOutputs]
"""What a step hands to each of vLLM's front ends."""

FINISH: Final = {
    FinishReason.RUNNING: None,
    FinishReason.EOS: VllmFinish.STOP,
    FinishReason.STOP_TOKEN: VllmFinish.STOP,
    FinishReason.STOP_STRING: VllmFinish.STOP,
    FinishReason.MAX_TOKENS: VllmFinish.LENGTH,
    FinishReason.CONTEXT: VllmFinish.LENGTH,
}


def single(client: int, output: EngineCoreOutput) -> Outputs:
    """One output of one front end's request."""
    return {client: EngineCoreOutputs(outputs=[output])}


def ending(client: int, name: str, reason: VllmFinish, why: str | None = None) -> Outputs:
    """The end of a request, without a token.

    Args:
        why: of an error; the client finds it as `stop_reason`, the only text that vLLM takes along.
    """
    return single(client, EngineCoreOutput(name, [], finish_reason=reason, stop_reason=why))


def merged(parts: list[Outputs]) -> Outputs:
    """Outputs in order, as one set for each front end; the last part brings what is not an output."""
    *earlier, last = parts
    for client in {client for part in earlier for client in part}:
        before = [o for part in earlier if client in part for o in part[client].outputs]
        now = last.setdefault(client, EngineCoreOutputs())
        now.outputs = [*before, *now.outputs]
    return last
