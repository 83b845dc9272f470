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
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from ._common import save
from ._overhead import make_model, options, ratio_of, share_of, show_ratios, show_shares

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
    """One scheduler; `hook_s` is the time that the log has taken in the turn so far.

    That is all that its hooks do in a step but the draw, without the sending itself, which SGLang would do earlier.
    """

    def __init__(self, scheduler: Any) -> None:
        from rollout_wal.engines.sglang import plugin

        assert plugin._state is not None
        self.scheduler, self.state = scheduler, plugin._state
        self.log, self.outputs = self.state.log, self.state._outputs
        self.held = scheduler.ipc_channels
        self.plain = replace(
            self.held,
            send_to_tokenizer=self.held.send_to_tokenizer._sender,
            send_to_detokenizer=self.held.send_to_detokenizer._sender,
        )
        self.hook_s = 0.0
        self._serial = 0
        self._time(self.state, "stepped", 1)
        self._time(self.outputs, "turn", 1)
        self._time(self.held.send_to_detokenizer, "send_output", 1)
        self._time(self.plain.send_to_detokenizer, "send_output", -1, only_in=self.outputs)

    def _time(self, of: Any, name: str, sign: int, only_in: Any = None) -> None:
        function = getattr(of, name)

        def timed(*args: Any, **named: Any) -> None:
            start = time.perf_counter()
            function(*args, **named)
            if only_in is None or self.state._outputs is only_in:
                self.hook_s += sign * (time.perf_counter() - start)

        setattr(of, name, timed)

    def _log_in_force(self, logged: bool) -> None:
        """Without it SGLang's senders send at once, and no hook has anything to do."""
        self.state.log = self.log if logged else None
        self.state._outputs = self.outputs if logged else None
        channels = self.held if logged else self.plain
        self.scheduler.ipc_channels = channels
        self.scheduler.output_streamer.send_to_detokenizer = channels.send_to_detokenizer

    def batch(self, kind: str, size: int) -> tuple[list[float], list[float]]:
        """Seconds of each of STEPS decoding steps of a fresh batch, and this package's in it."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._log_in_force(kind == "logged")
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
        step_s, hook_s = [], []
        for _ in range(STEPS):
            self.hook_s, start = 0.0, time.perf_counter()
            self.turn()
            step_s.append(time.perf_counter() - start)
            hook_s.append(self.hook_s)
        while not self.scheduler.is_fully_idle():
            self.turn()
        self.turn()
        return step_s, hook_s

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
    hook_s: list[float] = []
    step_s: list[float] = []
    log_ratios, draw_ratios, rates = [], [], []
    for kind in KINDS:
        bench.batch(kind, size)
    for _ in range(rounds):
        seconds = {}
        for kind in order.sample(KINDS, len(KINDS)):
            steps, hooks = bench.batch(kind, size)
            seconds[kind] = sum(steps)
            if kind == "logged":
                step_s += steps
                hook_s += hooks
        log_ratios.append(seconds["drawn"] / seconds["logged"])
        draw_ratios.append(seconds["sglang"] / seconds["drawn"])
        rates.append(size * STEPS / seconds["drawn"])
    return {
        "share": share_of(hook_s, step_s),
        "throughput": {**ratio_of(log_ratios), "tokens_per_s_without": statistics.median(rates)},
        "draw": ratio_of(draw_ratios),
    }


@click.command()
@options
def main(quick: bool, path: Path | None, folder: Path | None) -> None:
    """The plug-in's share of an SGLang step, and tokens/s with the log over without it, in interleaved batches."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scheduler, address = make_scheduler(make_model(Path(scratch) / "model"), Path(scratch) / "wal")
        with listener(address):
            bench = Bench(scheduler)
            results = {size: measure(bench, size, ROUNDS // (5 if quick else 1)) for size in SIZES}
    show_shares(
        "The log's share of a step of SGLang's scheduler, outputs held until durable",
        {size: r["share"] for size, r in results.items()},
    )
    show_ratios("Tokens/s with the log over without", {size: r["throughput"] for size, r in results.items()})
    print("The project's draw in place of SGLang's sampler, tokens/s:", end=" ")
    print(", ".join(f"{r['draw']['ratio']:.3f} at {size}" for size, r in results.items()))
    save(
        path,
        {
            "hook_share_p50_16": results[16]["share"]["p50"],
            "hook_share_p50_64": results[64]["share"]["p50"],
            "throughput_ratio": results[16]["throughput"]["ratio"],
            "sizes": {str(size): r for size, r in results.items()},
        },
        quick=quick,
    )


if __name__ == "__main__":
    main()
