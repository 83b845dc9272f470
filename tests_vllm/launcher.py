"""A process that has imported vLLM's server, and forks one for each line that it reads: a start without the imports.

Each line is JSON: {"argv": [...], "env": {...}, "log": path}. Prints the process id. The child is what
`python -m vllm.entrypoints.openai.api_server` is after its imports, in a session of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

import transformers  # noqa: F401
import vllm.model_executor.models.llama
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.entrypoints.launchers.api_server.entry import main

import rollout_wal.engines.vllm.scheduler  # noqa: F401


def become(server: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    out = os.open(server["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.environ.update(server["env"])
    # On a CPU vLLM spawns its engine core, which imports everything anew. Here it is a fork too.
    method = multiprocessing.get_context
    multiprocessing.get_context = lambda name=None: method("fork" if name == "spawn" else name)  # type: ignore[assignment]
    sys.argv[1:] = server["argv"]
    main()


if __name__ == "__main__":
    assert threading.active_count() == 1, "a fork would leave threads behind"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are buried by the kernel
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
            os._exit(0)
        print(child, flush=True)
