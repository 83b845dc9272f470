"""Lets vLLM's model runner V2 run on a CPU: its Triton kernels are interpreted. Import it before vLLM.

vLLM takes V2 on a CPU if Triton has a backend for CPUs. What is installed has none, but it has an interpreter, which
needs none; vLLM asks the backend of that name for no more than whether it is there. All else is vLLM's own: scheduler,
model runner, kernels. Interpreted, a step takes tens of milliseconds.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_Driver)
