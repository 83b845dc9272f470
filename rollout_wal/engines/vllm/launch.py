"""Starts vLLM with its engine core in this process, for the adapter. Sets the environment before vLLM is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

# The engine core in this process, so that a step is a step of this worker, and no call home from a machine that may
# have no network.
_ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_DEFAULTS: Final = {"VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.update(_ENVIRONMENT)
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)

from . import supported  # noqa: E402, F401  # isort: skip  # before what only the supported vLLM has
import torch  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

from ...errors import BadInput, problem  # noqa: E402
from ..common.checkpoint import model_folder  # noqa: E402
from .connector import CONNECTOR, BlockConnector  # noqa: E402
from .model import Checkpoint  # noqa: E402
from .worker import EXTENSION  # noqa: E402

_PROCESSOR: Final = "rollout_wal.engines.vllm.processor:PositionNoise"
_OURS: Final = (
    "speculative_config",
    "logits_processors",
    "worker_extension_cls",
    "scheduler_cls",
    "kv_transfer_config",
    "async_scheduling",
)
_INSTEAD: Final = {"max_num_seqs": "max_batch", "model": "the folder"}


def start(folder: Path, *, max_batch: int, dtype: str, kv_connector: bool, **engine_args: Any) -> Any:
    """vLLM's LLMEngine. The arguments are those of `VllmEngine.from_folder`.

    Raises:
        BadInput: no such model, or arguments that would break the sampling.
    """
    for name in _OURS:
        if engine_args.get(name):
            raise BadInput(
                problem(
                    f"{name} cannot be passed to a vLLM engine of rollout-wal",
                    consequence="No model was loaded: tokens would not be drawn by position, or not known when logged",
                    remedy="Leave it out",
                )
            )
    for name, instead in _INSTEAD.items():
        if name in engine_args:
            raise BadInput(
                problem(
                    f"{name} was passed to a vLLM engine of rollout-wal, which has {instead} for that",
                    consequence="No model was loaded: one of two values would have to be ignored",
                    remedy=f"Pass {instead}",
                )
            )
    if (stages := int(engine_args.get("pipeline_parallel_size") or 1)) != 1:
        raise BadInput(
            problem(
                f"pipeline_parallel_size={stages}: only the last stage samples, and the first one is asked",
                consequence="No model was loaded: tokens would not be known when they are logged",
                remedy="Use tensor_parallel_size, or vLLM's server with the scheduler class",
            )
        )
    model_folder(folder)
    Checkpoint(folder)  # refuses a folder without weights before vLLM starts
    return LLMEngine.from_engine_args(
        EngineArgs(
            **{
                "skip_tokenizer_init": True,  # tokens in, tokens out: text is the front end's business
                "disable_log_stats": True,
                "enforce_eager": not torch.cuda.is_available(),
                **engine_args,
                "model": str(folder),
                "dtype": dtype,
                "kv_transfer_config": _connector() if kv_connector else None,
                "max_num_seqs": max_batch,
                # A step is over when it returns: its tokens are logged under the weights that sampled them.
                "async_scheduling": False,
                "logits_processors": [_PROCESSOR],
                "worker_extension_cls": EXTENSION,
            }
        )
    )


def _connector() -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=BlockConnector.__module__,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )
