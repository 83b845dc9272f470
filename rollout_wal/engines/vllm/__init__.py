"""Rollouts on vLLM: the engine adapter, the logging scheduler, the sampler and the KV connector.

`engine.VllmEngine` runs vLLM inside a worker of `RolloutBackend`. `scheduler.LoggingScheduler` puts the log into the
engine core of a vLLM that somebody else drives: `vllm serve`, `AsyncLLM`, `LLM`. See docs/vllm.md.
"""

from __future__ import annotations

from importlib.util import find_spec

from ...errors import MissingExtra

if find_spec("vllm") is None:
    raise MissingExtra("vllm", "vllm", "Running rollouts on vLLM")
