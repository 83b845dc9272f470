"""When SGLang's scheduler hears of a SIGTERM: a reproducer for the hook that saving KV on notice would need.

    python examples/sglang_notice.py [MODEL]

A preempted machine gives seconds of notice. The worker of a `RolloutBackend` uses them to save the KV of what it runs.
In a server the notice reaches the front end, which waits until the last request has ended by itself, and tells the
scheduler (`Scheduler.handle_shutdown`) when nothing runs any more: there is nothing left to save, or the machine is
gone. `SGL_FORCE_SHUTDOWN=1` makes the front end tell it at its next look, up to five seconds after the signal.

No part of rollout-wal takes part in this but a tiny model. It prints what was running when the scheduler was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from rollout_wal.testing.tiny_models import make_tiny_model

REQUESTS, TOKENS = 4, 1500


def engine_of(model: str, told: Path) -> Any:
    def say(scheduler: Any, recv_req: Any) -> None:
        told.write_text(f"{time.time()} {len(scheduler.running_batch.reqs)}")

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.handle_shutdown", say, HookType.BEFORE)
    HookRegistry.apply_hooks()
    # The hook is a function of this process: SGLang's own are to be forks of it.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return sglang.Engine(
        model_path=model,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        mem_fraction_static=0.1,
        max_total_tokens=16384,
        dtype="float32",
        log_level="error",
    )


async def generate(engine: Any) -> None:
    async def one(seed: int) -> None:
        stream = await engine.async_generate(
            input_ids=[5 + seed, 6, 7],
            sampling_params={"max_new_tokens": TOKENS, "ignore_eos": True},
            stream=True,
        )
        async for _ in stream:
            begun.set()

    begun = asyncio.Event()
    tasks = [asyncio.create_task(one(seed)) for seed in range(REQUESTS)]
    await begun.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(*tasks)
    await asyncio.sleep(60)  # the front end ends the process


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = sys.argv[1] if len(sys.argv) > 1 else str(make_tiny_model(Path(scratch) / "model", mean_length=80.0))
        told = Path(scratch) / "told"
        engine = engine_of(model, told)
        start = time.time()
        with contextlib.suppress(SystemExit):
            engine.loop.run_until_complete(generate(engine))
        at, running = told.read_text().split()
        print(f"the scheduler was told {float(at) - start:.1f} s after the signal, with {running} requests running")


if __name__ == "__main__":
    main()
