"""An `sglang.Engine` in a process of its own, told what to do by lines of JSON; to be asked, and to be killed.

In:  {"do": "generate", "id": ..., "input_ids": [...], "params": {...}, "stream": true}
     {"do": "abort", "id": ...} | {"do": "pause", "mode": ...} | {"do": "continue"}
     {"do": "update", "path": ..., "version": ...} | {"do": "end"}
Out: {"event": "ready", "pids": {...}} | {"event": "shown", "id": ..., "count": ..., "output": {...}}
     {"event": "ended", "id": ..., "output": {...}} | {"event": "refused", "id": ..., "error": ...}
     {"event": "done", "do": ...}

Its process is forked from one that has imported SGLang. With `spawn` SGLang starts its own processes as it does for
everybody: each a new interpreter, which loads the plug-in by its entry point. Else they are forks too, which are there
many seconds earlier; a SIGKILL does to them what it does to any other.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

Tell = Callable[..., None]


async def serve(engine: Any, orders: Connection, tell: Tell) -> None:
    from sglang.srt.managers.io_struct import (
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
        UpdateWeightFromDiskReqInput,
    )

    manager = engine.tokenizer_manager
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    def begin(work: Any) -> None:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def generate(order: dict[str, Any]) -> None:
        try:
            stream = await engine.async_generate(
                input_ids=order["input_ids"],
                sampling_params=order["params"],
                return_logprob=order.get("logprobs", True),
                stream=True,
                rid=order["id"],
            )
            last: dict[str, Any] = {}
            async for last in stream:
                if order.get("stream"):
                    tell("shown", id=order["id"], output=_plain(last))
            tell("ended", id=order["id"], output=_plain(last))
        except ValueError as error:
            tell("refused", id=order["id"], error=str(error))

    while True:
        order = json.loads(await loop.run_in_executor(None, orders.recv_bytes))
        match order["do"]:
            case "generate":
                begin(generate(order))
            case "abort":
                manager.abort_request(order["id"])
            case "pause":
                await manager.pause_generation(PauseGenerationReqInput(mode=order["mode"]))
                tell("done", do="pause")
            case "continue":
                await manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
                tell("done", do="continue")
            case "update":
                ok, message, *_ = await manager.update_weights_from_disk(
                    UpdateWeightFromDiskReqInput(
                        model_path=order["path"],
                        weight_version=order.get("version"),
                        flush_cache=order.get("flush", True),
                    ),
                    None,
                )
                tell("done", do="update", ok=ok, message=message)
            case "end":
                break
    for task in list(tasks):
        await task


def _plain(output: dict[str, Any]) -> dict[str, Any]:
    meta = output.get("meta_info", {})
    return {
        "tokens": list(output.get("output_ids", [])),
        "text": output.get("text", ""),
        "finish": meta.get("finish_reason"),
        "logprobs": [value for value, *_ in meta.get("output_token_logprobs") or []],
        "versions": meta.get("weight_versions"),
        "prompt_tokens": meta.get("prompt_tokens"),
        "cached_tokens": meta.get("cached_tokens"),
        "retractions": meta.get("num_retractions"),
    }


def _alone(errors: Path) -> None:
    """In a process group of its own, with its words in a file."""
    os.setsid()
    with errors.open("ab") as stderr:
        os.dup2(stderr.fileno(), 1)
        os.dup2(stderr.fileno(), 2)


def run(
    orders: Connection,
    events: Connection,
    options: dict[str, Any],
    variables: dict[str, str],
    errors: Path,
    spawn: bool,
) -> None:
    """What the process does. `variables`: added to its environment."""
    _alone(errors)
    os.environ.update(variables)

    def tell(event: str, **more: Any) -> None:
        events.send_bytes(json.dumps({"event": event, **more}).encode())

    import sglang

    if not spawn:
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    engine = sglang.Engine(
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        mem_fraction_static=0.1,
        log_level="warning",
        stream_interval=1,
        **options,
    )
    pids = {}
    for child in psutil.Process().children(recursive=True):
        title = " ".join(child.cmdline())
        for role in ("scheduler", "detokenizer"):
            if role in title:
                pids[role] = child.pid
    tell("ready", pids=pids)
    engine.loop.run_until_complete(serve(engine, orders, tell))
    engine.shutdown()


def load(errors: Path, act: str) -> None:
    """Do `act`, which may break SGLang, and then load its plug-ins; says how many hooks were registered."""
    _alone(errors)
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    exec(act, {"os": os, "sys": sys, "Scheduler": Scheduler, "HookRegistry": HookRegistry})
    load_plugins()
    print("hooks", sum(map(len, HookRegistry._hooks.values())), flush=True)
