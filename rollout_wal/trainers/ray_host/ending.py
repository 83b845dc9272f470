"""An actor whose backend has stopped by itself ends, so that Ray starts another one, where the log ends."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Final

from ...backend import RolloutBackend
from ...errors import LogFenced, MissingExtra

try:
    import ray
except ImportError as error:
    raise MissingExtra(error.name or "ray", "ray", "a rollout backend on Ray") from None

#: So long the actor still answers, with the reason: who waited for a rollout has asked for nothing else.
_TELLS_S: Final = 2.0

logger = logging.getLogger(__name__)


def end_with(backend: RolloutBackend) -> None:
    """See to it that this actor does not outlive its backend. Left alone it would answer every call with an error, and
    as it lives, Ray would never restart it; a detached one would meet each trainer that is started again.

    A cause that is still there (no disk space, no model) fails the next actor while it starts; then Ray declares it
    dead, with that reason, and `start_host` makes a new one.
    """
    coordinator = backend.coordinator
    assert coordinator is not None
    threading.Thread(target=_wait, args=(coordinator,), name="end with the backend", daemon=True).start()


def _wait(coordinator: threading.Thread) -> None:
    coordinator.join()
    error = getattr(coordinator, "error", None)
    if error is None:
        return  # closed on purpose
    logger.error("the rollout backend has stopped, and its host with it: %s", error)
    time.sleep(_TELLS_S)
    if isinstance(error, LogFenced):
        # Somebody else owns the job now. A successor of this actor would take it from them again, and so on for ever.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
    os._exit(1)
