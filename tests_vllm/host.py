"""A process with vLLM's engine core and the log in it, driven from a file of requests: `python host.py JOB.json`.

For what must be set before vLLM is imported: the model runner, asynchronous scheduling. Prints how many tokens it has
handed out, and at the end, as JSON, what each request got.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

JOB: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
if JOB["runner"] == "v2":
    import interpreted  # noqa: F401
from scheduling import schedule_asynchronously  # noqa: E402

if JOB["asynchronous"]:
    schedule_asynchronously()

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

Got = dict[str, dict[str, Any]]


def ask(engine: LLMEngine, requests: list[dict[str, Any]]) -> Got:
    """All of them together, to their ends; one with `upto` is aborted when it has so many tokens."""
    got: Got = {}
    for number, request in enumerate(requests):
        got[f"{number}"] = {"tokens": [], "logprobs": [], "routes": None, "finish": None}
        params = SamplingParams(
            detokenize=False,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"rollout": request["rollout"], "rollout_key": request["key"]},
            **request["sampling"],
        )
        engine.add_request(f"{number}", {"prompt_token_ids": request["prompt"]}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            (choice,) = output.outputs
            mine = got[output.request_id]
            mine["tokens"] += choice.token_ids
            mine["logprobs"] += [next(iter(d.values())).logprob for d in choice.logprobs or ()]
            mine["finish"] = choice.finish_reason
            if choice.routed_experts is not None:
                mine["routes"] = choice.routed_experts.tolist()
            upto = requests[int(output.request_id)].get("upto")
            if upto is not None and len(mine["tokens"]) >= upto and not output.finished:
                engine.abort_request([output.request_id])
        count = sum(len(g["tokens"]) for g in got.values())
        if JOB["version_at"] and count >= JOB["version_at"]:
            JOB["version_at"] = 0
            change_weights(engine, got)
        print("tokens", count, flush=True)
    return got


def change_weights(engine: LLMEngine, got: Got) -> None:
    """Say that there are others, with a step in flight; note how many tokens each request has or will have by it.

    Not named, they are replaced as by somebody who knows nothing of versions.
    """
    core = engine.engine_core.engine_core
    for name, rollout in core.scheduler._rollouts.items():
        request = core.scheduler.requests[name]
        got[rollout.spec.name[-1]]["old"] = request.num_output_tokens + request.num_output_placeholders
    if JOB["named"]:
        core.set_weight_version("5")
    else:
        core.collective_rpc("reload_weights")


def main() -> None:
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=JOB["model"],
            enforce_eager=True,
            dtype="float32",
            block_size=32,
            max_num_seqs=8,
            num_gpu_blocks_override=40,
            max_num_batched_tokens=64,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            enable_return_routed_experts=JOB["routes"],
            scheduler_cls="rollout_wal.engines.vllm.scheduler.LoggingScheduler",
            logits_processors=["rollout_wal.engines.vllm.processor:PositionNoise"],
            additional_config={"rollout_wal": {"log": JOB["log"]}},
        )
    )
    config = engine.vllm_config
    assert config.use_v2_model_runner is (JOB["runner"] == "v2")
    assert config.scheduler_config.async_scheduling is JOB["asynchronous"]
    for requests in JOB["rounds"]:
        print("got", json.dumps(ask(engine, requests)), flush=True)
        if not JOB["named"]:
            engine.engine_core.engine_core.set_weight_version("5")
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
