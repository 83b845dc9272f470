"""An `sglang.Engine` in a process of its own, told what to do in lines of JSON; to be asked, and to be killed.

In:  {"do": "generate", "id": ..., "input_ids": [...], "params": {...}, "stream": true}
     {"do": "abort", "id": ...} | {"do": "pause", "mode": ...} | {"do": "continue"}
     {"do": "update", "path": ..., "version": ...} | {"do": "end"}
Out: {"event": "ready", "pids": {...}} | {"event": "shown", "id": ..., "count": ..., "output": {...}}
     {"event": "ended", "id": ..., "output": {...}} | {"event": "refused", "id": ..., "error": ...}
     {"event": "done", "do": ...}
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import psutil


def tell(event: str, **more: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **more}) + "\n")
    sys.stdout.flush()


async def serve(engine: Any) -> None:
    from sglang.srt.managers.io_struct import (
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
        UpdateWeightFromDiskReqInput,
    )

    manager = engine.tokenizer_manager
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

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

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        match order["do"]:
            case "generate":
                task = loop.create_task(generate(order))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
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
    }


def main() -> None:
    options = json.loads(sys.argv[1])
    import sglang

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
    engine.loop.run_until_complete(serve(engine))
    engine.shutdown()


if __name__ == "__main__":
    main()
