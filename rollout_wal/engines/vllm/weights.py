"""Which weights a step samples from, and how an engine core's scheduler hears that they are replaced.

vLLM replaces weights first and names their version afterwards, if at all; and it tells its engine core, not the
scheduler. So both are passed on: from the first sign of a replacement the weights are nameless, and they stay so until
a version is named.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from . import supported  # noqa: F401  # isort: skip  # before what only the supported vLLM has
from vllm.v1.engine.core import EngineCore

#: Methods of vLLM's workers that leave the weights alone. Whatever else is called on the workers (a worker extension's
#: method, a function) may replace them, and nobody could tell.
HARMLESS: Final = frozenset(
    {
        "check_health",
        "compute_weight_checksums",
        "get_compilation_match_table",
        "get_encoder_timing_stats",
        "get_model_inspection",
        "get_supported_tasks",
        "init_weight_transfer_engine",
        "list_loras",
        "profile",
        "reset_encoder_cache",
        "reset_mm_cache",
        "rollout_wal_drawn",
        "save_sharded_state",
        "shutdown_weight_transfer_engine",
        "synchronize_device",
        "update_max_model_len",
    }
)
_DISCARDS: Final = 2
"""Level of a sleep after which the weights are gone."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What steps sample from, from some step on."""

    version: int | None
    """None: they may have been replaced, and nobody has named a version since."""
    by: str = ""
    """What may have replaced them."""


class WatchesWeights(ABC):
    """A scheduler that is told."""

    @abstractmethod
    def weights_touched(self, by: str) -> None:
        """The weights may be replaced from now on: what is scheduled from here on has no version."""

    @abstractmethod
    def policy_changed(self, version: str) -> None:
        """A version was named: what is scheduled from here on is of it."""


def watch() -> None:
    """Wrap what tells an engine core of new weights, once per process."""
    if getattr(EngineCore.collective_rpc, "watched", False):
        return

    def wrap(name: str, announce: Callable[..., None]) -> None:
        original = getattr(EngineCore, name)

        @functools.wraps(original)  # vLLM looks at the parameters of what it calls
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Before the call: if it fails halfway, what the weights are is unknown all the same.
            scheduler = getattr(self, "scheduler", None)
            if isinstance(scheduler, WatchesWeights):
                announce(scheduler, *args, **kwargs)
            return original(self, *args, **kwargs)

        method.watched = True  # type: ignore[attr-defined]
        setattr(EngineCore, name, method)

    wrap("set_weight_version", _named)
    wrap("collective_rpc", _called)
    wrap("sleep", _slept)


def _named(scheduler: WatchesWeights, weight_version: str) -> None:
    scheduler.policy_changed(weight_version)


def _called(scheduler: WatchesWeights, method: str | Callable[..., Any], *_: Any, **__: Any) -> None:
    name = method if isinstance(method, str) else "a function that was called on the workers"
    if name not in HARMLESS:
        scheduler.weights_touched(name)


def _slept(scheduler: WatchesWeights, level: int = 1, *_: Any, **__: Any) -> None:
    if level >= _DISCARDS:
        scheduler.weights_touched(f"sleep(level={level})")
