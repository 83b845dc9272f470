"""What a training step of TRL's GRPOTrainer takes on this backend, over what it takes with TRL's own generation.

    python -m benchmarks.trl_step [--quick] --json FILE

Short runs in pairs, one of each kind, which goes first being drawn; the median step of each run, without its first one.
A step is all of it: rollouts, losses, optimizer, and here the hand-over of the weights; no checkpoint. Both sample and
train with one thread each and with the same model, whose random weights end no completion early. The backend samples in
a process of its own with noise by position, and logs; TRL in the trainer's.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from ._common import save, show
from ._overhead import make_model

#: name -> hidden size, layers.
MODELS = {"tiny": (64, 2), "small": (512, 8)}
COMPLETIONS, TOKENS = 16, 64


def run(model: Path, folder: Path, steps: int, *, logged: bool) -> list[float]:
    """Seconds of each step but the first."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

    from rollout_wal.backend import RolloutBackend
    from rollout_wal.trainers.trl import GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    config = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=COMPLETIONS,
        num_generations=8,
        max_completion_length=TOKENS,
        max_steps=steps,
        save_strategy="no",
        learning_rate=1e-6,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    common: dict[str, Any] = {
        "args": config,
        "train_dataset": Dataset.from_dict({"prompt": [f"count to {i}" for i in range(64)]}),
        "processing_class": AutoTokenizer.from_pretrained(model),
        "callbacks": [Clock()],
    }
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    with contextlib.ExitStack() as stack:
        if logged:
            backend = stack.enter_context(RolloutBackend(model, folder / "wal", slots=COMPLETIONS))
            trainer: Any = GRPOTrainer(policy, _reward, backend=backend, **common)
        else:
            trainer = trl.GRPOTrainer(policy, _reward, **common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [end - start for start, end in itertools.pairwise(ends)]


def _reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text.count("a")) for text in completions]


def compare(name: str, pairs: int, steps: int) -> dict[str, Any]:
    """Pairs of runs with one model."""
    from rollout_wal.testing.tiny_models import make_tiny_model

    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", *MODELS[name])
        tokenizer = make_tiny_model(Path(scratch) / "tokenizer")
        for path in tokenizer.glob("*token*.json"):
            (model / path.name).write_bytes(path.read_bytes())
        medians: dict[bool, list[float]] = {False: [], True: []}
        for pair in range(pairs):
            for logged in draw.sample([False, True], 2):
                folder = Path(scratch) / f"{pair}-{logged}"
                medians[logged].append(statistics.median(run(model, folder, steps, logged=logged)))
    ratios = [ours / own for own, ours in zip(medians[False], medians[True], strict=True)]
    own, ours = statistics.median(medians[False]), statistics.median(medians[True])
    return {
        "own_s": own,
        "backend_s": ours,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "more_ms_per_token_step": 1e3 * (ours - own) / TOKENS,
        "pairs": pairs,
        "steps": steps - 1,
    }


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Fewer and shorter runs.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the numbers to this file.")
def main(quick: bool, path: Path | None) -> None:
    torch.set_num_threads(1)
    pairs, steps = (1, 4) if quick else (5, 7)
    found = {name: compare(name, pairs, steps) for name in MODELS}
    show(
        f"a step of GRPOTrainer, {COMPLETIONS} completions of {TOKENS} tokens",
        ["model (hidden x layers)", "TRL's own, s", "backend, s", "ratio", "more, ms per token step"],
        [
            [
                f"{name} ({'x'.join(map(str, MODELS[name]))})",
                f"{r['own_s']:.2f}",
                f"{r['backend_s']:.2f}",
                f"{r['ratio']:.2f}",
                f"{r['more_ms_per_token_step']:.1f}",
            ]
            for name, r in found.items()
        ],
    )
    save(path, {"completions": COMPLETIONS, "tokens": TOKENS, "models": found}, quick=quick)


if __name__ == "__main__":
    main()
