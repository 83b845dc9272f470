"""What the log costs inside vLLM: the hook's share of an engine step, and tokens/s with the log over without.

    .venv-vllm/bin/python -m benchmarks.vllm_overhead [--quick] --json FILE

The real engine core with the logging scheduler, in this process, outputs held until durable. The hook's share of a step
is the time that the scheduler's own methods take beyond those of vLLM's that they call, over the time of the step;
p50 over steps in which all requests decode. Throughput is compared in interleaved pairs of short blocks of steps of one
running batch, with and without the log; both are drawn by the project's sampler, so that the difference is the log.
"""

from __future__ import annotations

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from vllm import SamplingParams as VllmParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine

from ._common import save
from ._overhead import HIDDEN, LAYERS, make_model, options, ratio_of, share_of, show_ratios, show_shares

REQUESTS = (16, 64)
STEPS = 200
PAIRS = 60
BLOCK = 10
PAIRS_PER_BATCH = 20


def make_engine(folder: Path, log: Path, hidden: int, layers: int) -> Any:
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(make_model(folder, hidden, layers)),
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_num_seqs=max(REQUESTS),
            max_model_len=2048,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            enable_prefix_caching=False,
            scheduler_cls="rollout_wal.engines.vllm.scheduler.LoggingScheduler",
            logits_processors=["rollout_wal.engines.vllm.processor:PositionNoise"],
            additional_config={"rollout_wal": {"log": str(log)}},
        )
    )


class Hook:
    """The time spent in the scheduler's hook, without that in vLLM's own method which it calls."""

    def __init__(self, scheduler: Any) -> None:
        self.seconds = 0.0
        self._inside = 0.0
        inner = Scheduler.update_from_output
        outer = scheduler.update_from_output

        def timed_inner(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self._inside += time.perf_counter() - start

        def timed_outer(*args: Any) -> Any:
            self._inside = 0.0
            start = time.perf_counter()
            out = outer(*args)
            self.seconds = time.perf_counter() - start - self._inside
            return out

        Scheduler.update_from_output = timed_inner
        scheduler.update_from_output = timed_outer


class Bench:
    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.core = engine.engine_core
        self.hook = Hook(self.core.engine_core.scheduler)
        self._tasks = engine.get_supported_tasks()
        self._count = 0
        self._running: list[str] = []

    def begin(self, requests: int) -> None:
        """A fresh batch, past its prefill."""
        self.core.abort_requests(self._running)
        while self.core.engine_core.scheduler.has_requests():
            self.core.get_output()
        self._running = []
        for index in range(requests):
            self._count += 1
            params = VllmParams(
                max_tokens=1800,
                ignore_eos=True,
                detokenize=False,
                extra_args={"rollout": self._count, "rollout_key": index},
            )
            name = f"{self._count}"
            source = {"prompt_token_ids": list(range(1, 9))}
            self.core.add_request(
                self.engine.input_processor.process_inputs(name, source, params, supported_tasks=self._tasks)
            )
            self._running.append(name)
        for _ in range(5):
            self.core.get_output()

    def steps(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds of each step, and the hook's in it."""
        walls, hooks = [], []
        for _ in range(count):
            start = time.perf_counter()
            self.core.get_output()
            walls.append(time.perf_counter() - start)
            hooks.append(self.hook.seconds)
        return walls, hooks


def share(bench: Bench, requests: int, steps: int) -> dict[str, float]:
    bench.begin(requests)
    walls, hooks = bench.steps(steps)
    return share_of(hooks, walls)


def block(bench: Bench, logged: bool) -> float:
    """Seconds of BLOCK steps of the running batch, the wait for the last sync included."""
    scheduler = bench.core.engine_core.scheduler
    rollouts = scheduler._rollouts
    if not logged:
        scheduler._rollouts = {}  # the scheduler knows of no rollout: all outputs pass, as vLLM's own would
    start = time.perf_counter()
    for _ in range(BLOCK):
        bench.core.get_output()
    if logged:
        scheduler._log.flush()
        scheduler._log.take()
    seconds = time.perf_counter() - start
    scheduler._rollouts = rollouts
    return seconds


def throughput(bench: Bench, requests: int, pairs: int) -> dict[str, Any]:
    order = random.Random(0)
    ratios, rates = [], []
    for number in range(pairs):
        if number % PAIRS_PER_BATCH == 0:
            bench.begin(requests)
            block(bench, True)
        seconds = {logged: block(bench, logged) for logged in order.sample((False, True), 2)}
        ratios.append(seconds[False] / seconds[True])
        rates.append(requests * BLOCK / seconds[False])
    return {**ratio_of(ratios), "tokens_per_s_without": statistics.median(rates)}


@click.command()
@options
@click.option("--hidden", default=HIDDEN, show_default=True, help="Hidden size of the model.")
@click.option("--layers", default=LAYERS, show_default=True, help="Layers of the model.")
def main(quick: bool, path: Path | None, folder: Path | None, hidden: int, layers: int) -> None:
    """The log's cost inside vLLM's engine core."""
    cut: Callable[[int], int] = (lambda n: max(4, n // 5)) if quick else (lambda n: n)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        engine = make_engine(Path(scratch) / "model", Path(scratch) / "wal", hidden, layers)
        bench = Bench(engine)
        shares = {n: share(bench, n, cut(STEPS)) for n in REQUESTS}
        rate = throughput(bench, REQUESTS[0], cut(PAIRS))
        engine.engine_core.shutdown()
    show_shares("The hook's share of a step of vLLM's engine core, outputs held until durable", shares)
    show_ratios("Tokens/s with the log over without, in interleaved pairs", {REQUESTS[0]: rate})
    save(
        path,
        {
            "hook_share_p50_16": shares[16]["p50"],
            "hook_share_p50_64": shares[64]["p50"],
            "throughput_ratio": rate["ratio"],
            "model": {"hidden": hidden, "layers": layers},
            "shares": {str(n): s for n, s in shares.items()},
            "throughput": rate,
        },
        quick=quick,
    )


if __name__ == "__main__":
    main()
