"""One event loop on one thread for all synchronous clients of a process.

gRPC hands events of all loops of a process to one poller. A loop that is closed while another lives may still be handed
one, and says so on standard error; so this one is closed when the process ends, and not before.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading

_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop] | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop, running. A forked child gets one of its own: threads do not survive a fork."""
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="scoring-client", daemon=True)
            thread.start()
            atexit.register(_end, os.getpid(), loop, thread)
            _running = os.getpid(), loop
        return _running[1]


def _end(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if os.getpid() == pid:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5.0)
