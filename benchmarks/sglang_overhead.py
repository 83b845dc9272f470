"""What the plug-in costs SGLang: its share of a step, and tokens/s with the log over tokens/s without it.

    .venv-sglang/bin/python -m benchmarks.sglang_overhead [--quick] --json FILE

SGLang's own scheduler runs in this process with the plug-in applied, and sends what it releases to another process over
its own socket. Batches of three kinds take turns, in an order that is drawn: requests that SGLang samples by itself,
rollouts whose tokens are drawn by position and not logged (as on a rank without the log), and rollouts that are logged
and held until durable. The prefill and the first steps of a batch are not timed.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ._common import save, show

HIDDEN, LAYERS, VOCABULARY = 512, 8, 4096
SIZES = (16, 64)
KINDS = ("sglang", "drawn", "logged")
STEPS, WARM_UP = 24, 3
ROUNDS = 20

_LISTENER = """
import sys, zmq
s = zmq.Context().socket(zmq.PULL)
s.bind(sys.argv[1])
print("listening", flush=True)
while True: s.recv()
"""


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def listener(address: str) -> Iterator[None]:
    """A process that takes what SGLang's front end would take."""
    process = subprocess.Popen([sys.executable, "-c", _LISTENER, address], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield
    process.kill()
    process.wait()


def make_scheduler(model: Path, log: Path) -> tuple[Any, str]:
    """SGLang's scheduler with the plug-in applied, and the address that it sends to."""
    from rollout_wal.engines.sglang import plugin

    os.environ[plugin.LOG] = str(log)
    plugin.register()
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    args = ServerArgs(
        model_path=str(model),
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        mem_fraction_static=0.1,
        max_total_tokens=8192,
        max_running_requests=max(SIZES),
        log_level="error",
    )
    args.resolve_once()
    args.check_server_args()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    ports = PortArgs.init_new(args)
    scheduler = Scheduler(args, ports)
    scheduler.schedule_stream.synchronize = lambda: None
    scheduler._war_barrier_enabled = False
    scheduler.metrics_reporter.start_scheduler_time_accounting()
    return scheduler, ports.tokenizer_ipc_name


class Bench:
    """One scheduler; `hooked_s` is the time that this package has spent in the turn so far, but for the draw."""

    def __init__(self, scheduler: Any) -> None:
        from rollout_wal.engines.sglang import plugin

        assert plugin._state is not None
        self.scheduler, self.state = scheduler, plugin._state
        self.log = self.state.log
        self.hooked_s = 0.0
        self._serial = 0
        for name in ("stepped", "turn"):
            setattr(self.state, name, self._timed(getattr(self.state, name)))

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            function(*args)
            self.hooked_s += time.perf_counter() - start

        return timed

    def batch(self, kind: str, size: int) -> tuple[float, list[float]]:
        """(seconds, shares): of STEPS decoding steps of a fresh batch, and this package's share of each."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        self.state.log = self.log if kind == "logged" else None
        for _ in range(size):
            self._serial += 1
            params = SamplingParams(
                max_new_tokens=STEPS + 2 * WARM_UP,
                ignore_eos=True,
                custom_params=None if kind == "sglang" else {"rollout": self._serial},
            )
            params.normalize(None)
            self.scheduler.process_input_requests(
                [
                    TokenizedGenerateReqInput(
                        rid=f"{self._serial:08d}",
                        input_text="",
                        input_ids=array("q", [self._serial % 4000 + 1, 2, 3, 4]),
                        input_embeds=None,
                        mm_inputs=None,
                        token_type_ids=None,
                        sampling_params=params,
                        return_logprob=True,
                        logprob_start_len=-1,
                        top_logprobs_num=0,
                        token_ids_logprob=None,
                        stream=True,
                    )
                ]
            )
        while len(self.scheduler.running_batch.reqs) < size:
            self.turn()
        for _ in range(WARM_UP):
            self.turn()
        times, shares = [], []
        for _ in range(STEPS):
            self.hooked_s, start = 0.0, time.perf_counter()
            self.turn()
            times.append(time.perf_counter() - start)
            shares.append(self.hooked_s / times[-1])
        while not self.scheduler.is_fully_idle():
            self.turn()
        self.turn()
        return sum(times), shares

    @torch.no_grad()
    def turn(self) -> None:
        """One turn of SGLang's event loop."""
        s = self.scheduler
        s.ingest_requests()
        plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
        s.running_batch = plan.running_batch
        if plan.batch_to_run:
            s.process_batch_result(plan.batch_to_run, s.run_batch(plan.batch_to_run))
        else:
            s.on_idle()
        s.last_batch = plan.batch_to_run


def measure(bench: Bench, size: int, rounds: int) -> dict[str, Any]:
    order = random.Random(size)
    shares: list[float] = []
    log_ratios, draw_ratios, rates = [], [], []
    for kind in KINDS:
        bench.batch(kind, size)
    for _ in range(rounds):
        seconds = {}
        for kind in order.sample(KINDS, len(KINDS)):
            seconds[kind], of_each = bench.batch(kind, size)
            if kind == "logged":
                shares += of_each
        log_ratios.append(seconds["drawn"] / seconds["logged"])
        draw_ratios.append(seconds["sglang"] / seconds["drawn"])
        rates.append(size * STEPS / seconds["sglang"])
    quartiles = statistics.quantiles(log_ratios, n=4)
    hundredths = statistics.quantiles(shares, n=100)
    return {
        "hook_share_p50": statistics.median(shares),
        "hook_share_p99": hundredths[98],
        "throughput_ratio": statistics.median(log_ratios),
        "throughput_ratio_quartiles": [quartiles[0], quartiles[2]],
        "draw_ratio": statistics.median(draw_ratios),
        "tokens_per_s_sglang": statistics.median(rates),
        "step_ms_sglang": 1e3 * size / statistics.median(rates),
        "rounds": rounds,
    }


@click.command()
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the numbers to this file.")
@click.option("--folder", type=click.Path(path_type=Path), default=None, help="Where the log is; a disk, not a tmpfs.")
def main(quick: bool, path: Path | None, folder: Path | None) -> None:
    """The plug-in's share of an SGLang step, and tokens/s with the log over without it, in interleaved batches."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scheduler, address = make_scheduler(make_model(Path(scratch) / "model"), Path(scratch) / "wal")
        with listener(address):
            bench = Bench(scheduler)
            results = {size: measure(bench, size, ROUNDS // (5 if quick else 1)) for size in SIZES}
    show(
        "SGLang with the log, over the same without it",
        ["requests", "hook share p50", "p99", "throughput ratio", "quartiles", "draw ratio", "step ms"],
        [
            [
                size,
                f"{r['hook_share_p50']:.2%}",
                f"{r['hook_share_p99']:.2%}",
                f"{r['throughput_ratio']:.3f}",
                "–".join(f"{q:.3f}" for q in r["throughput_ratio_quartiles"]),
                f"{r['draw_ratio']:.3f}",
                f"{r['step_ms_sglang']:.1f}",
            ]
            for size, r in results.items()
        ],
    )
    save(
        path,
        {
            "hook_share_p50_16": results[16]["hook_share_p50"],
            "hook_share_p50_64": results[64]["hook_share_p50"],
            "throughput_ratio": results[64]["throughput_ratio"],
            "sizes": {str(size): r for size, r in results.items()},
        },
        quick=quick,
    )


if __name__ == "__main__":
    main()
