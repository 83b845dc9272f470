"""The write-ahead log inside an SGLang that others start: a plug-in for `sglang.Engine` and `launch_server`.

    ROLLOUT_WAL_SGLANG_LOG=runs/wal python -m sglang.launch_server --model-path MODEL

Requests whose `custom_params` name a rollout (see `common.spec`) are logged step by step in the scheduler's process,
and nothing leaves it before the records that justify it are durable. A request that names a rollout of which tokens
are logged, by this process or by one that was killed, goes on from them: its output begins with what is logged, and a
rollout that had ended is answered from the log alone. All other requests pass untouched.

Without the environment variable nothing is hooked. With it, a hook that is not in force stops the server at its start.
SGLang is hooked in `server_hooks`; what the hooks do is in `server_log`. Both are imported by `register` alone: SGLang
goes on without a plug-in that fails while it is imported, so this module imports nothing that can.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

from ...errors import RolloutWalError, problem

if TYPE_CHECKING:
    from .server_log import ServerLog

log = logging.getLogger("sglang.rollout_wal")

LOG: Final = "ROLLOUT_WAL_SGLANG_LOG"
"""Directory of the log; each data-parallel rank has its own log in it, named by its number. See `options`."""

_state: ServerLog | None = None
"""Of this process's scheduler; there is one."""


def state() -> ServerLog | None:
    """The log of this process's scheduler; None in other processes, and before the scheduler is built."""
    return _state


def begin(new: ServerLog) -> None:
    """The scheduler is built, and this is its log."""
    global _state
    _state = new


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
        from . import server_hooks

        server_hooks.install()
    except Exception as error:
        ours = isinstance(error, RolloutWalError)
        why = str(error) if ours else _not_loaded(error)
        log.critical("%s", why, exc_info=None if ours else error)
        with contextlib.suppress(Exception):
            print(f"rollout-wal: {why}", flush=True)
        os._exit(1)


def _not_loaded(error: Exception) -> str:
    return problem(
        f"rollout-wal could not be loaded: {type(error).__name__}: {error}",
        consequence="This process of SGLang ends: it would run without the log that was asked for",
        remedy=f"Install what is missing in SGLang's environment, or unset {LOG}",
    )
