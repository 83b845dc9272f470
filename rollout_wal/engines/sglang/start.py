"""SGLang's scheduler, started in this process: its arguments, its globals, its process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import sglang.srt.models.registry  # noqa: F401  # every model that SGLang knows, before workers are forked
import torch
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import PortArgs, ServerArgs

from ...errors import BadInput, problem
from .configuration import UNSUPPORTED
from .scheduler import EmbeddedScheduler

_ALWAYS: Final = {"skip_tokenizer_init": True, "disable_overlap_schedule": True, "log_level": "warning"}
_ON_A_CPU: Final = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.1,
    "disable_cuda_graph": True,
}
_ONE_PROCESS: Final = "it is one process; run SGLang's own server with the plug-in for parallelism"
#: What the plug-in refuses, and what the embedded engine cannot do besides.
_REFUSED: Final = {
    **UNSUPPORTED,
    "tp_size": (1, _ONE_PROCESS),
    "dp_size": (1, _ONE_PROCESS),
    "disable_overlap_schedule": (True, "each step is appended before the next is drawn"),
    "skip_tokenizer_init": (True, "it takes and gives token ids"),
}


def refuse_arguments(server_args: Mapping[str, Any]) -> None:
    """Raises BadInput: arguments with which tokens would be drawn elsewhere."""
    for name, (allowed, why) in _REFUSED.items():
        if server_args.get(name, allowed) != allowed:
            raise BadInput(
                problem(
                    f"server_args has {name}={server_args[name]!r}; the embedded engine needs {allowed!r}: {why}",
                    consequence="No model was loaded",
                    remedy=f"Leave {name} out",
                )
            )


def _join_a_world_of_one(device: str) -> None:
    """torch.distributed without a port to meet at: two workers that start at once would race for a free one.

    What gloo listens at itself is a port that the kernel picks; of a world of one it need not be seen from outside.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cpu" and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def start_scheduler(given: Mapping[str, Any]) -> EmbeddedScheduler:
    """Load the model. Once per process.

    Args:
        given: fields of SGLang's ServerArgs, the device among them.
    """
    args = ServerArgs(**{**_ALWAYS, **(_ON_A_CPU if given["device"] == "cpu" else {}), **given})
    args.resolve_once()
    args.check_server_args()
    _join_a_world_of_one(given["device"])
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    scheduler = EmbeddedScheduler(args, PortArgs.init_new(args))
    scheduler.start()
    return scheduler
