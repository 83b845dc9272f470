"""SGLang's scheduler inside a process of ours: no sockets, no tokenizer, no loop of its own.

A step here is one turn of `Scheduler.event_loop_normal`. What it would send to the detokenizer is collected instead,
and nothing is received: requests are handed over by calls.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.utils import DynamicGradMode

from ..common.support import Hook

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
#: What is overridden or called here; looked up before anything starts.
RELIED_ON = (
    Hook(f"{_SCHEDULER}.init_ipc_channels", ("self", "port_args")),
    Hook(f"{_SCHEDULER}.get_output_streamer_class", ("self",)),
    Hook(f"{_SCHEDULER}.get_next_batch_to_run", ("self", "running_batch", "last_batch")),
    Hook(f"{_SCHEDULER}.run_batch", ("self", "batch")),
    Hook(f"{_SCHEDULER}.process_batch_result", ("self", "batch", "result")),
    Hook(f"{_SCHEDULER}.process_input_requests", ("self", "recv_reqs")),
    Hook(f"{_SCHEDULER}.abort_request", ("self", "recv_req")),
    Hook(f"{_SCHEDULER}.pause_generation", ("self", "recv_req")),
    Hook(f"{_SCHEDULER}.continue_generation", ("self", "recv_req")),
    Hook(f"{_SCHEDULER}.flush_cache", ("self",)),
    Hook(f"{_SCHEDULER}.on_idle", ("self",)),
    Hook(
        "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer.stream_output",
        ("self", "reqs", "return_logprob", "skip_req"),
    ),
)


class Collector(SchedulerOutputStreamer):
    """Stands in for the output streamer: the requests of a step are kept for whoever drives the scheduler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[Any] = []

    def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        self.seen.extend(req for req in reqs if req is not skip_req)

    def take(self) -> list[Any]:
        seen, self.seen = self.seen, []
        return seen


class AbortSender(SenderWrapper):
    """Keeps what the scheduler ends by itself: requests that it refuses, or has no memory for."""

    def __init__(self) -> None:
        super().__init__(None)
        self.sent: list[Any] = []

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        self.sent.append(output)

    def take(self) -> list[Any]:
        sent, self.sent = self.sent, []
        return sent


class EmbeddedScheduler(Scheduler):
    """See the module. One per process: SGLang keeps its configuration in globals."""

    def init_ipc_channels(self, port_args: Any) -> None:
        self.ipc_channels = SchedulerIpcChannels(
            recv_from_tokenizer=None,
            recv_from_rpc=None,
            send_to_tokenizer=AbortSender(),
            send_to_detokenizer=SenderWrapper(None),
            send_metrics_from_scheduler=None,
        )
        self.load_snapshot_writer = None
        self.recv_from_tokenizer = None

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return Collector

    def start(self) -> None:
        """What SGLang does between building a scheduler and its first turn."""
        if self.device == "cpu":
            self.schedule_stream.synchronize = lambda: None
        self._war_barrier_enabled = self.device == "cuda"
        self.metrics_reporter.start_scheduler_time_accounting()

    running_batch: Any
    last_batch: Any

    def turn(self) -> list[Any]:
        """One turn of the loop. Returns the requests that it touched: those may have a new token or have ended."""
        with DynamicGradMode(), self.device_module.StreamContext(self.schedule_stream):
            plan = self.get_next_batch_to_run(running_batch=self.running_batch, last_batch=self.last_batch)
            self.running_batch = plan.running_batch
            batch = plan.batch_to_run
            self.cur_batch_for_debug = batch
            if batch:
                self.process_batch_result(batch, self.run_batch(batch))
            else:
                self._sched_idled = True
                self.on_idle()
            self.last_batch = batch
        return self.output_streamer.take()  # type: ignore[no-any-return]

    def ended_by_itself(self) -> list[Any]:
        """AbortReq of requests that the scheduler has ended outside of a turn's results, since the last call."""
        return self.ipc_channels.send_to_tokenizer.take()  # type: ignore[no-any-return]
