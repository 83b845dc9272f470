"""What a client of a logging vLLM says about a rollout, and what of vLLM's parameters may go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmParams


def validate(params: VllmParams) -> None:
    """placeholder"""
