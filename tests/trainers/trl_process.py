"""A training run of a tiny model in a process of its own: `python trl_process.py FOLDER [JSON options]`.

It goes on from its last whole checkpoint and its log; tests kill it and start it again. Under torchrun, each rank has a
log of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "steps": 6,
    "save_steps": 1,
    "num_iterations": 1,
    "steps_per_generation": 2,
    "die_at": None,  # [name of a moment, how often it has come]
    "die_rank": 0,
    "workers": 1,
    "worker_kills": 0,  # SIGKILLs to a worker while it samples
    "model": {"mean_length": 12.0},  # of make_tiny_model
    "engine": {},  # of EngineSpec; none: the embedded one
    "config": {},  # more of TRL's
    "scorer": None,  # host:port of a scoring server; then it is distilled from the teacher "t"
    "kwargs": {},
}


def vowels(completions: list[str], **kwargs: Any) -> list[float]:
    """How much of it is vowels: something that a tiny model can learn."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


class Moments:
    """SIGKILL to this process at a named moment: as the machine would."""

    def __init__(self, die_at: tuple[str, int] | None) -> None:
        self._die_at = die_at
        self._seen: dict[str, int] = {}

    def __call__(self, name: str) -> None:
        if self.has_come(name):
            os.kill(os.getpid(), signal.SIGKILL)

    def has_come(self, name: str) -> bool:
        """Whether it is the last one."""
        self._seen[name] = self._seen.get(name, 0) + 1
        return bool(self._die_at) and (name, self._seen[name]) == tuple(self._die_at)


def die_while_sampling(backend: Any) -> None:
    """In the middle of what is sampled now."""
    first = backend.worker_steps()
    while all(steps < first[name][1] + 3 for name, (_, steps) in backend.worker_steps().items()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_workers(backend: Any, times: int) -> None:
    """Each time in the middle of its sampling."""
    seen = 0
    while times:
        for starts, steps in backend.worker_steps().values():
            if starts > seen and steps >= 3:
                seen, times = starts, times - 1
                backend.kill_worker("0")
        time.sleep(0.005)


def run(folder: Path, options: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, GRPOConfig

    from rollout_wal.backend import EngineSpec, RolloutBackend
    from rollout_wal.testing.tiny_models import make_tiny_model
    from rollout_wal.trainers import ledger
    from rollout_wal.trainers.trl import GRPOTrainer, last_checkpoint

    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    moment = Moments(options["die_at"] if rank == options["die_rank"] else None)
    wal = folder / "wal" if ranks == 1 else folder / "wal" / f"rank-{rank}"
    model_folder = folder / ("model" if rank == 0 else f"model-{rank}")
    if not (model_folder / "config.json").exists():
        make_tiny_model(model_folder, **options["model"])
    # A run goes over them more than once.
    prompts = [f"count to {i}" for i in range(6 if options["scorer"] is None else 16)]
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": options["steps"],
        "save_steps": options["save_steps"],
        "save_total_limit": 2,
        "num_iterations": options["num_iterations"],
        "steps_per_generation": options["steps_per_generation"],
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
        "gradient_checkpointing": False,
    }
    grpo = options["scorer"] is None
    if not grpo:
        for name in ("num_generations", "num_iterations", "steps_per_generation"):
            del settings[name]
    config = (GRPOConfig if grpo else DistillationConfig)(**(settings | options["config"]))
    spec = EngineSpec(str(model_folder), **options["engine"]) if options["engine"] else model_folder
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(RolloutBackend(spec, wal, workers=options["workers"], slots=8))
        common: dict[str, Any] = {
            "args": config,
            "train_dataset": Dataset.from_dict({"prompt": prompts, "teacher": ["t"] * len(prompts)}),
            "processing_class": AutoTokenizer.from_pretrained(model_folder),
            "backend": backend,
            "archive": folder / "archive",
            **options["kwargs"],
        }
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
        trainer: Any
        if grpo:
            trainer = GRPOTrainer(model, vowels, **common)
        else:
            from rollout_wal.trainers.trl import DistillationTrainer
            from scoring.client import ScoringClient

            scorer = stack.enter_context(ScoringClient([options["scorer"]]))
            trainer = DistillationTrainer(model, scorer=scorer, **common)
        # Moments: after the rollouts came, after a step, inside and after a checkpoint.
        generate, commit, write = trainer._ledger.generate, trainer._ledger.commit, ledger.write_state
        step = trainer.training_step

        def generated(*args: Any, **kwargs: Any) -> Any:
            moment("before generate")
            if moment.has_come("sampling"):
                threading.Thread(target=die_while_sampling, args=(backend,), daemon=True).start()
            found = generate(*args, **kwargs)
            moment("generated")
            return found

        def stepped(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            moment("stepped")
            return found

        def committed(state: Any) -> None:
            moment("before commit")
            commit(state)
            moment("committed")

        def consume(batch: Any) -> None:
            moment("before consume")
            kept(batch)

        kept = trainer._ledger._consume
        trainer._ledger.generate, trainer._ledger.commit = generated, committed
        trainer._ledger._consume = consume
        trainer.training_step = stepped
        import rollout_wal.trainers.trl.common as adapter

        def written(*args: Any, **kwargs: Any) -> None:
            moment("before state")
            write(*args, **kwargs)

        adapter.write_state = written
        killer = threading.Thread(target=kill_workers, args=(backend, options["worker_kills"]), daemon=True)
        killer.start()
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
        trainer.save_model(str(folder / "final"))
        done = {
            "balance": str(backend.balance()),
            "holds": backend.balance().holds,
            "deaths": backend.stats.deaths,
            "log": trainer.state.log_history,
            "version": backend.policy_version,
        }
        (folder / ("done.json" if rank == 0 else f"done-{rank}.json")).write_text(json.dumps(done))


if __name__ == "__main__":
    run(Path(sys.argv[1]), OPTIONS | json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
