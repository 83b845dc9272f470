"""A learner in a process of its own: generates, has scored, trains, keeps a checkpoint; and may be killed anywhere.

Its weights are the list of what it was trained on, kept in one file with the pipeline's state, as a checkpoint is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rollout_wal.backend import RolloutBackend
from rollout_wal.params import SamplingParams
from scoring.client import ClientOptions
from scoring.items import Wanted
from scoring.pipeline import Pipeline, PipelineOptions, PromptBatch
from scoring.routing import DomainRouter


def prompts(number: int, count: int) -> PromptBatch | None:
    if number >= count:
        return None
    rng = np.random.default_rng(number)
    domains = ("math", "code")
    return PromptBatch([rng.integers(4, 200, 8).tolist() for _ in domains], [{"domain": d} for d in domains])


def main(config: dict[str, Any]) -> None:
    where = Path(config["path"])
    checkpoint = where / "checkpoint.json"
    held: dict[str, Any] = {"steps": [], "pipeline": {}}
    if checkpoint.exists():
        held = json.loads(checkpoint.read_text())
    options = PipelineOptions(group_size=2, generation=8, scoring=8, scored=8, seal_s=0.02, commit_s=0.02)
    router = DomainRouter({"math": "t-math", "code": {"t-code": 0.5, "t-math": 0.5}})
    with (
        RolloutBackend(config["model"], where / "wal", workers=1, slots=8, segment_bytes=1 << 18) as backend,
        Pipeline(
            backend,
            where / "data",
            config["targets"],
            partial(prompts, count=config.get("batches", 6)),
            SamplingParams(max_tokens=60),
            router=router,
            wanted=Wanted(True, 4),
            options=options,
            client=ClientOptions(patience_s=240, backoff_max_s=0.5),
            state=held["pipeline"],
        ) as pipeline,
    ):
        (where / "pids.json").write_text(json.dumps(backend.worker_pids()))
        for batch in pipeline:
            taken = []
            for sample in batch.samples:
                mask = sample.tokens.array("loss_mask").astype(bool)
                for teacher in sample.metadata["teachers"]:
                    row = sample.group(f"teacher.{teacher}")
                    assert row is not None
                    assert (row["logprobs"].valid == mask).all()  # type: ignore[union-attr]
                taken.append([sample.key, sample.tokens.array("token_ids").tolist()])
            time.sleep(config.get("step_s", 0.0))
            held["steps"].append([batch.number, taken])
            held["pipeline"] = pipeline.trained(batch, len(held["steps"]))
            if config.get("die_at") == ["trained", batch.number]:
                os.kill(os.getpid(), signal.SIGKILL)
            part = checkpoint.with_suffix(".part")
            part.write_text(json.dumps(held))
            part.replace(checkpoint)
            if config.get("die_at") == ["saved", batch.number]:
                os.kill(os.getpid(), signal.SIGKILL)
            pipeline.commit()
            if config.get("die_at") == ["committed", batch.number]:
                os.kill(os.getpid(), signal.SIGKILL)
        balance = backend.balance()
        print(
            json.dumps({"coverage": pipeline.stats().score_coverage, "balance": str(balance), "holds": balance.holds})
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
