"""On-policy distillation from two teachers, whole: generate, seal, score, plan, load, loss, step.

    python examples/score_and_train.py out

Models are tiny ones made on the spot, and everything runs here, on loopback. Kill it at any moment and run it again:
rollouts go on from their last durable token, the dataset takes each once, and what has scores is not scored again.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollout_wal.backend import RolloutBackend
from rollout_wal.dataset import DatasetWriter, Loader, PlanSpec, open_dataset, plan
from rollout_wal.dataset.collate import collate_padded
from rollout_wal.delivery import to_sample
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from scoring.client import ScoringClient
from scoring.dataset_scoring import ScoringSpec, score_dataset
from scoring.losses import multi_teacher_advantages, policy_gradient_loss
from scoring.residency import Residency
from scoring.routing import DomainRouter, routed
from scoring.scheduler import Scheduler
from scoring.server import serve
from scoring.teachers.hf import HfTeacherSource

TEACHERS = ("sums", "words")
ROUTER = DomainRouter({"math": "sums", "chat": {"words": 0.75, "sums": 0.25}})
SAMPLING = SamplingParams(max_tokens=48)


def models(folder: Path) -> dict[str, Path]:
    """A student and two teachers, which share its tokenizer."""
    texts = [f"{i} plus {j} equals {i + j}, {i} times {j} is {i * j}" for i in range(60) for j in range(60)]
    names = ("student", *TEACHERS)
    return {name: make_tiny_model(folder / name, seed=seed, texts=texts) for seed, name in enumerate(names)}


@contextmanager
def teachers(folders: dict[str, Path]) -> Iterator[str]:
    """A scoring server: host:port. In earnest, run `rollout-wal serve-teachers teachers.yaml`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    sources = [HfTeacherSource(name, folders[name], precision="float32") for name in TEACHERS]
    sizes = {source.info.id: source.info.nbytes for source in sources}

    async def start():  # type: ignore[no-untyped-def]
        return await serve(Scheduler(sources, Residency(sizes, sum(sizes.values()))))

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.drain(5.0), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def generate(student: Path, out: Path, prompts: list[list[int]], domains: list[str]) -> None:
    """Rollouts into the dataset, each with its teachers and with who chose them."""
    with RolloutBackend(student, out / "wal", segment_bytes=1 << 20) as backend:
        metadata = [{"domain": domain} for domain in domains]
        rollouts = list(backend.generate(prompts, SAMPLING, group_size=4, cohort="example", metadata=metadata))
        samples = [routed(to_sample(rollout, backend.info, SAMPLING), ROUTER) for rollout in rollouts]
        DatasetWriter(out / "data", writer_id="example", check_fence=backend.check_fence).seal(samples)
        backend.release([rollout.id for rollout in rollouts])


def train(student: Path, out: Path) -> list[float]:
    """One epoch of on-policy distillation; the reverse KL to the teachers, per token, at each step."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    plan(open_dataset(out / "data"), PlanSpec(token_budget=256)).write(out / "plan.arrow")
    groups = [f"teacher.{name}" for name in TEACHERS]
    divergences = []
    # Not every sample has both teachers' scores.
    with Loader(out / "data", out / "plan.arrow", name=str(out), groups=("tokens", *groups), need_all=False) as loader:
        for batch in loader:
            here = [g for g in groups if any(sample.group(g) is not None for sample in batch.samples)]
            names = [f"{g}.{column}" for g in here for column in ("logprobs", "weight")]
            padded = collate_padded(batch.samples, names)
            logits = model(padded.input_ids, attention_mask=padded.attention_mask.long()).logits[:, :-1].float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, padded.input_ids[:, 1:, None])[..., 0]
            scores, weights = (
                torch.stack([padded.columns[f"{g}.{column}"][:, 1:] for g in here]) for column in ("logprobs", "weight")
            )
            scored = torch.stack([padded.masks[f"{g}.logprobs"][:, 1:] for g in here]) & padded.loss_mask[:, 1:]
            mask = scored.any(0)
            advantages = multi_teacher_advantages(scores, weights, logprobs, scored)
            loss = policy_gradient_loss(logprobs, advantages, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            divergences.append(-float(advantages[mask].mean()))
    return divergences


def main(out: Path) -> list[float]:
    folders = models(out / "models")
    prompts = [[5 + i, 40 + i, 90 + i] for i in range(6)]
    generate(folders["student"], out, prompts, ["math", "chat"] * 3)
    with teachers(folders) as target, ScoringClient([target]) as client:
        report = score_dataset(out / "data", client, ScoringSpec())
    print(f"{report.committed} scored now, {report.already} before, by teacher {dict(report.by_teacher)}")
    divergences = train(folders["student"], out)
    print("reverse KL by step:", " ".join(f"{kl:.3f}" for kl in divergences))
    return divergences


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/score_and_train"))
