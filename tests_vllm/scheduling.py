"""Lets vLLM schedule asynchronously on a CPU, as it does on a GPU. Call it before an engine is made."""

from __future__ import annotations

from typing import Any


def schedule_asynchronously() -> None:
    """The next step is computed before this one's outputs are handed out. vLLM turns that off on CPUs, as needless."""
    from vllm.platforms.cpu import CpuPlatform

    original: Any = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
