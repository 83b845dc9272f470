"""On-policy distillation in bare PyTorch, the whole loop: rollouts, seal, score, plan, load, loss, step, new version.

    python examples/train_opd.py out/train_opd

Models are tiny ones made on the spot, and the teacher is served on loopback. Kill it at any moment and run it again:
it goes on from its last checkpoint with the same rollouts, and none is trained on twice. The rollouts' own
log-probabilities correct for the steps by which the model is ahead of the policy that sampled them.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.dataset import DatasetWriter, Loader, PlanSpec, open_dataset, plan
from rollout_wal.dataset.collate import PaddedBatch, collate_padded
from rollout_wal.delivery import to_sample
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ledger import STATE_FILE, TrainerLedger, read_state, sync_tree, write_state
from scoring.client import ScoringClient
from scoring.dataset_scoring import ScoringSpec, score_dataset
from scoring.losses import masked_importance_loss, opd_advantages
from scoring.residency import Residency
from scoring.routing import DomainRouter, routed
from scoring.scheduler import Scheduler
from scoring.server import serve
from scoring.teachers.hf import HfTeacherSource

BATCHES, CHECKPOINT_EVERY, PROMPTS, TOKEN_BUDGET = 6, 2, 32, 768
SAMPLING = SamplingParams(max_tokens=24)
COLUMNS = ("sampling_logprobs", "teacher.teacher.logprobs")
ROUTER = DomainRouter({"": "teacher"})  # every sample, as none names its domain


@contextmanager
def teacher(folder: Path) -> Iterator[str]:
    """A scoring server: host:port. In earnest, run `rollout-wal serve-teachers teachers.yaml` elsewhere."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    source = HfTeacherSource("teacher", folder, precision="mxfp4")

    async def start():  # type: ignore[no-untyped-def]
        return await serve(Scheduler([source], Residency({"teacher": source.info.nbytes}, source.info.nbytes)))

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.drain(5.0), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Trainer:
    """One life of the training process."""

    def __init__(self, out: Path, student: Path, backend: RolloutBackend, client: ScoringClient) -> None:
        self.out, self.backend, self.client = out, backend, client
        self.tokenizer = AutoTokenizer.from_pretrained(student)
        self.model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.ledger = TrainerLedger(backend, "opd")
        self.step = 0

    def run(self) -> list[float]:
        """From the last checkpoint to the end; the reverse KL to the teacher, per token, of each batch."""
        first, divergences = self.resume(), []
        for batch in range(first, BATCHES):
            if self.backend.policy_version < batch:  # else it was sampled in an earlier life, and is in the log
                self.backend.update_weights(self.model.state_dict(), batch)
            rollouts = self.generate(batch)
            folder = self.seal(batch, rollouts)
            score_dataset(folder, self.client, ScoringSpec(failures_max=1))
            divergences.append(self.train(folder, batch))
            self.ledger.used(batch, self.step)
            print(f"batch {batch}: step {self.step}, reverse KL {divergences[-1]:.3f}", flush=True)
            if (batch + 1) % CHECKPOINT_EVERY == 0:
                self.checkpoint(batch + 1)
        return divergences

    def generate(self, batch: int) -> list[FinishedRollout]:
        """What a batch is must follow from its number alone: asked for again after a crash, it is in the log."""
        prompts = [self.tokenizer(f"{batch} plus {i} equals").input_ids for i in range(PROMPTS)]
        return self.ledger.generate(batch, prompts, SAMPLING, seed=batch)

    def seal(self, batch: int, rollouts: list[FinishedRollout]) -> Path:
        """A dataset of this batch. Sealed again after a crash, each rollout is there once."""
        folder = self.out / "data" / f"{batch:06d}"
        samples = [routed(to_sample(r, self.backend.info, SAMPLING), ROUTER) for r in rollouts]
        DatasetWriter(folder, writer_id="opd", check_fence=self.backend.check_fence).seal(samples)
        return folder

    def train(self, folder: Path, batch: int) -> float:
        """An optimizer step for each row of the plan."""
        path = folder / "plan.arrow"
        plan(open_dataset(folder), PlanSpec(token_budget=TOKEN_BUDGET, seed=batch)).write(path)
        divergences = []
        with Loader(folder, path, name=f"opd:{folder}", groups=("tokens", "teacher.teacher")) as loader:
            for mini in loader:
                loss, divergence = self.loss(collate_padded(mini.samples, COLUMNS))
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.step += 1
                divergences.append(divergence)
        return sum(divergences) / len(divergences)

    def loss(self, batch: PaddedBatch) -> tuple[torch.Tensor, float]:
        """Entry t of every column is about token t, so the logits of t - 1 go with it."""
        logits = self.model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        sampler, teacher = (batch.columns[name][:, 1:] for name in COLUMNS)
        mask = (batch.loss_mask & batch.masks[COLUMNS[0]] & batch.masks[COLUMNS[1]])[:, 1:]
        advantages = opd_advantages(teacher, logprobs, mask)
        loss = masked_importance_loss(logprobs, sampler, advantages, mask)
        return loss, -float(advantages[mask].mean())

    def checkpoint(self, batches: int) -> None:
        """Durable first, then committed: only then does the log let go of the rollouts that it contains."""
        state = self.ledger.state(batches, self.step)
        folder = self.out / "checkpoints" / f"{batches:06d}"
        shutil.rmtree(folder, ignore_errors=True)  # one that a crash cut short
        folder.mkdir(parents=True)
        save_model(self.model, str(folder / "model.safetensors"))
        moments = {f"{i}.{k}": v for i, e in self.optimizer.state_dict()["state"].items() for k, v in e.items()}
        save_file(moments, folder / "optimizer.safetensors")
        sync_tree(folder)
        write_state(folder, state)  # last: a folder that has it is whole
        self.ledger.commit(state)

    def resume(self) -> int:
        """The first batch that the last whole checkpoint does not contain."""
        whole = [p for p in (self.out / "checkpoints").glob("*") if (p / STATE_FILE).is_file()]
        if not whole:
            self.ledger.restore(None)
            return 0
        folder = max(whole)
        load_model(self.model, folder / "model.safetensors")
        raw = self.optimizer.state_dict()
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            raw["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(raw)
        state = read_state(folder)
        self.ledger.restore(state)
        self.step = state["step"]
        return int(state["batches"])


def main(out: Path) -> list[float]:
    texts = [f"{i} plus {j} equals {i + j}, {i} times {j} is {i * j}" for i in range(60) for j in range(60)]
    folders = [
        make_tiny_model(out / name, seed=i, texts=texts, mean_length=12)
        for i, name in enumerate(("student", "teacher"))
    ]
    with (
        teacher(folders[1]) as address,
        RolloutBackend(folders[0], out / "wal", workers=2, segment_bytes=1 << 20) as backend,
        ScoringClient([address]) as client,
    ):
        return Trainer(out, folders[0], backend, client).run()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/train_opd"))
