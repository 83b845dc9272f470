"""Where SGLang's server is hooked, and that each hook is in force; what the hooks do is in `server_log`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from ...errors import BackendError, problem
from ..common.support import Hook
from . import hooks, plugin, versions
from .configuration import check_configuration
from .hooks import REQ, Wrap
from .options import Options
from .retraction import RETRACTION
from .server_log import ServerLog
from .weights import is_number

log = logging.getLogger("sglang.rollout_wal")

_SCHEDULER: Final = "sglang.srt.managers.scheduler:Scheduler"
_STREAMER: Final = "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer"
_RECEIVER: Final = "sglang.srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver"
_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"


def install() -> None:
    """Hook this process.

    Raises:
        UnsupportedEngine, HookMoved: another SGLang than the one that this was made for.
        BadInput: see `Options.from_environment`.
    """
    versions.check()
    Options.from_environment()  # said here, and not only once the model is loaded
    hooks.install(WRAPS, RELIED_ON)


# -- hooks: each has the parameters of what it wraps, and AFTER ones the result before them ------------------------


def _built(result: Any, scheduler: Any, server_args: Any, port_args: Any) -> None:
    """AFTER Scheduler.__init__: everything is in place, and nothing has been received yet."""
    hooks.check_in_force(WRAPS)
    check_configuration(scheduler, plugin.LOG)
    options = Options.from_environment()
    path = options.log / str(_dp_rank())
    plugin.begin(ServerLog(scheduler, path, options))
    log.info("rollouts are logged in %s", path)


def _pulled(recv_reqs: Any, receiver: Any) -> None:
    if (state := plugin.state()) is not None and recv_reqs:
        state.pulled(recv_reqs)


def _created(req: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    if (state := plugin.state()) is not None:
        state.created(req, recv_req)


def _queue(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    state = plugin.state()
    return original(scheduler, req, is_retracted) if state is None or state.queued(req) else None


def _stream(streamer: Any, reqs: Any, return_logprob: bool, skip_req: Any = None) -> None:
    if (state := plugin.state()) is not None:
        state.stepped(reqs, skip_req)


def _ingest(scheduler: Any, stop_at_pause: bool = False) -> None:
    if (state := plugin.state()) is not None:
        state.turn()


def _abort_output(scheduler: Any, abort_req: Any, req: Any) -> None:
    if (state := plugin.state()) is not None:
        state.gone(req)


def _pause(result: Any, scheduler: Any, recv_req: Any) -> None:
    if (state := plugin.state()) is not None:
        state.drain()


def _shutdown(scheduler: Any, recv_req: Any) -> None:
    if (state := plugin.state()) is not None:
        state.drain()


def _update(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    state = plugin.state()
    if state is None:
        return original(updater, recv_req)
    source = getattr(recv_req, "model_path", "") or ""
    if why := state.weights.refusal(recv_req.weight_version, source):
        return _refused(recv_req, why)
    state.drain()
    result = original(updater, recv_req)
    # SGLang reports a failure too where the weights are new and only the cache could not be flushed.
    if _weight_version() == recv_req.weight_version:
        state.updated(recv_req.weight_version, source, bool(recv_req.flush_cache) and result.success)
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
    if (state := plugin.state()) is not None and is_number(recv_req.new_version):
        state.updated(str(recv_req.new_version), "", False)
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
