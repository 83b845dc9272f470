"""The write-ahead log inside an SGLang that others start: a plug-in for `sglang.Engine` and `launch_server`.

    ROLLOUT_WAL_SGLANG_LOG=runs/wal python -m sglang.launch_server --model-path MODEL

Requests whose `custom_params` name a rollout (see `common.spec`) are logged step by step in the scheduler's process,
and nothing leaves it before the records that justify it are durable. A request that names a rollout of which tokens
are logged, by this process or by one that was killed, goes on from them: its output begins with what is logged, and a
rollout that had ended is answered from the log alone. All other requests pass untouched.

Without the environment variable nothing is hooked. With it, a hook that is not in force stops the server at its start.
Here is only where SGLang is hooked; what the hooks do is in `server_log`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ...errors import BackendError, problem
from ..common.support import Hook
from . import hooks, versions
from .configuration import check_configuration
from .hooks import REQ, Wrap
from .retraction import RETRACTION
from .server_log import ServerLog
from .weights import is_number

log = logging.getLogger("sglang.rollout_wal")

LOG: Final = "ROLLOUT_WAL_SGLANG_LOG"
"""Directory of the log; each data-parallel rank has its own log in it, named by its number."""
VERSION: Final = "ROLLOUT_WAL_SGLANG_POLICY_VERSION"
"""Number of the weights that the server starts with. Default: 0."""

_SCHEDULER: Final = "sglang.srt.managers.scheduler:Scheduler"
_STREAMER: Final = "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer"
_RECEIVER: Final = "sglang.srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"

_state: ServerLog | None = None
"""Of this process's scheduler; there is one."""


def kv_weights() -> tuple[int, str] | None:
    """Version and digest of the weights that all cached KV is of; None while that is not known."""
    return _state.weights.of_kv if _state is not None else None


def register() -> None:
    """The entry point `sglang.srt.plugins`. SGLang calls it in each of its processes, before anything is built.

    SGLang logs what an entry point raises and goes on; so that nobody runs without a log who asked for one, a process
    that cannot be hooked ends here.
    """
    if not os.environ.get(LOG):
        return
    try:
        versions.check()
        hooks.install(WRAPS, RELIED_ON)
    except Exception as error:
        log.critical("%s", error)
        with contextlib.suppress(Exception):
            print(f"rollout-wal: {error}", flush=True)
        os._exit(1)


# -- hooks: each has the parameters of what it wraps, and AFTER ones the result before them ------------------------


def _built(result: Any, scheduler: Any, server_args: Any, port_args: Any) -> None:
    """AFTER Scheduler.__init__: everything is in place, and nothing has been received yet."""
    global _state
    hooks.check_in_force(WRAPS)
    check_configuration(scheduler, LOG)
    _state = ServerLog(scheduler, Path(os.environ[LOG]) / str(_dp_rank()), int(os.environ.get(VERSION, "0")))
    log.info("rollouts are logged in %s", os.environ[LOG])


def _pulled(recv_reqs: Any, receiver: Any) -> None:
    if _state is not None and recv_reqs:
        _state.pulled(recv_reqs)


def _created(req: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    if _state is not None:
        _state.created(req, recv_req)


def _queue(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    return original(scheduler, req, is_retracted) if _state is None or _state.queued(req) else None


def _stream(streamer: Any, reqs: Any, return_logprob: bool, skip_req: Any = None) -> None:
    if _state is not None:
        _state.stepped(reqs, skip_req)


def _ingest(scheduler: Any, stop_at_pause: bool = False) -> None:
    if _state is not None:
        _state.turn()


def _abort_output(scheduler: Any, abort_req: Any, req: Any) -> None:
    if _state is not None:
        _state.gone(req)


def _pause(result: Any, scheduler: Any, recv_req: Any) -> None:
    if _state is not None:
        _state.drain()


def _shutdown(scheduler: Any, recv_req: Any) -> None:
    if _state is not None:
        _state.drain()


def _update(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    if _state is None:
        return original(updater, recv_req)
    source = getattr(recv_req, "model_path", "") or ""
    if why := _state.weights.refusal(recv_req.weight_version, source):
        return _refused(recv_req, why)
    _state.drain()
    result = original(updater, recv_req)
    # SGLang reports a failure too where the weights are new and only the cache could not be flushed.
    if _weight_version() == recv_req.weight_version:
        _state.updated(recv_req.weight_version, source, bool(recv_req.flush_cache) and result.success)
    elif not result.success:
        raise BackendError(
            problem(
                f"SGLang failed while it replaced the weights: {result.message}",
                consequence="Which weights it has is unknown, so it ends: no token can be attributed",
                remedy="Start it again from the weights that are logged; rollouts go on from what is logged",
            )
        )
    return result


def _label(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    result = original(scheduler, recv_req)
    if _state is not None and is_number(recv_req.new_version):
        _state.updated(str(recv_req.new_version), "", False)
    return result


def _refused(recv_req: Any, why: str) -> Any:
    """SGLang's own answer to an update of this kind."""
    from sglang.srt.managers import io_struct

    output = type(recv_req).__name__.removesuffix("ReqInput") + "ReqOutput"
    return getattr(io_struct, output)(success=False, message=why)


def _weight_version() -> str:
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().weight_version)


def _dp_rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().dp_rank or 0


WRAPS: Final = (
    *hooks.SAMPLING,
    *RETRACTION,
    Wrap(Hook(f"{_SCHEDULER}.__init__", ("self", "server_args", "port_args")), "AFTER", _built),
    Wrap(Hook(f"{_RECEIVER}._pull_raw_reqs", ("self",)), "AFTER", _pulled),
    Wrap(Hook(f"{_SCHEDULER}._create_generation_req", ("self", "recv_req", "args", "kwargs")), "AFTER", _created),
    Wrap(Hook(f"{_SCHEDULER}._add_request_to_queue", ("self", "req", "is_retracted")), "AROUND", _queue),
    Wrap(Hook(f"{_STREAMER}.stream_output", ("self", "reqs", "return_logprob", "skip_req")), "BEFORE", _stream),
    Wrap(Hook(f"{_SCHEDULER}.ingest_requests", ("self", "stop_at_pause")), "BEFORE", _ingest),
    Wrap(Hook(f"{_SCHEDULER}.send_abort_output", ("self", "abort_req", "req")), "BEFORE", _abort_output),
    Wrap(Hook(f"{_SCHEDULER}.pause_generation", ("self", "recv_req")), "AFTER", _pause),
    Wrap(Hook(f"{_SCHEDULER}.handle_shutdown", ("self", "recv_req")), "BEFORE", _shutdown),
    Wrap(Hook(f"{_SCHEDULER}.handle_update_weight_version", ("self", "recv_req")), "AROUND", _label),
    *(
        Wrap(Hook(f"{_UPDATER}.update_weights_from_{how}", ("self", "recv_req")), "AROUND", _update)
        for how in ("disk", "distributed", "tensor", "ipc")
    ),
)
#: Not hooked, and relied on.
RELIED_ON: Final = (
    Hook(f"{REQ}.set_finish_with_abort", ("self", "error_msg")),
    Hook(f"{_SCHEDULER}.abort_request", ("self", "recv_req")),
    Hook("sglang.srt.managers.scheduler_components.output_sender:SenderWrapper.send_output", ("self", "output")),
    Hook("sglang.srt.utils.weight_versions:WeightVersionEvent"),
    *(
        Hook(f"sglang.srt.managers.io_struct:{name}ReqOutput")
        for name in (
            "UpdateWeightFromDisk",
            "UpdateWeightsFromDistributed",
            "UpdateWeightsFromTensor",
            "UpdateWeightsFromIPC",
        )
    ),
)
