"""The student's trainer, a process of its own: `python -m rollout_wal.trainers.mopd.student JOB.json`.

Each generation batch goes once round:

    ledger.generate ─▶ dataset (seal) ─▶ teachers' scores over gRPC (column groups) ─▶ plan ─▶ Loader ─▶ loss ─▶ steps
        ▲                                                                                                       │
        └──────────── checkpoint, ledger.commit ◀── backend.update_weights ◀──────────────────────────────────────┘

Killed at any moment and started again it goes on from its last checkpoint: the same batches come again, token for
token, what was sealed is not sealed twice, and what was scored is not scored twice.

Shape legend: B = sequences, T = tokens of the longest but one, V = vocabulary, H = hidden size, k = top tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout_kernels.linear_divergence import ForwardKL
from scoring.client import ClientOptions, ScoringClient
from scoring.dataset_scoring import ScoringSpec, score_dataset
from scoring.diagnostics import support_overlap
from scoring.items import Wanted
from scoring.losses import full_vocabulary_loss, masked_importance_loss, opd_advantages
from scoring.routing import DomainRouter, routed

from ...backend import FinishedRollout, RolloutBackend
from ...dataset import DatasetWriter, Loader, PlanSpec, open_dataset, plan
from ...dataset.collate import PaddedBatch, collate_padded
from ...delivery import to_sample
from ...demo.killer import BackendKiller, KillSchedule
from ...errors import ProvenanceError, problem
from ...params import SamplingParams
from ..ledger import TrainerLedger
from .advantages import weigh
from .checkpoint import drop_older, last_checkpoint, load_checkpoint, save_checkpoint
from .config import Job
from .lifeline import die_with_parent
from .models import MAX_ANSWER_TOKENS, accuracy, decode, encode, load_model
from .tasks import DOMAINS, Problem, problems, reward

METRICS = "metrics.jsonl"
PRECISION = "mxfp4"
_TOP = 4
_STRIDE = 1 << 20  # problems that a seed may use up in a domain


class Student:
    """One life of the trainer. `run` returns when the last batch is trained on and committed."""

    def __init__(self, job: Job, backend: RolloutBackend, scorer: ScoringClient) -> None:
        config = job.config
        self.job, self.config, self.backend, self.scorer = job, config, backend, scorer
        self.sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS)
        self.router = DomainRouter({domain: domain for domain in DOMAINS})
        self.model = load_model(job.student)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.peak_learning_rate, weight_decay=0.0)
        self.ledger = TrainerLedger(backend, "mopd", extras={"trainer": "mopd", "objective": config.objective})
        self.checkpoints = job.folder / "checkpoints"
        self.step = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._heads: dict[str, Tensor] = {}
        self._held_out = {d: list(islice(problems(d, "held_out"), config.held_out)) for d in DOMAINS}

    def run(self) -> None:
        """From the last checkpoint to the end."""
        folder = last_checkpoint(self.checkpoints)
        state = load_checkpoint(folder, self.model, self.optimizer) if folder else None
        self.ledger.restore(state)
        first = int(state["batches"]) if state else 0
        self.step = int(state["step"]) if state else 0
        if not first:
            self._note({"batch": 0, "step": 0, "accuracy": self.evaluate()})
        for batch in range(first, self.config.batches):
            self._note(self.batch(batch))
            if (batch + 1) % self.config.checkpoint_every == 0 or batch + 1 == self.config.batches:
                self.checkpoint(batch + 1)

    def batch(self, number: int) -> dict[str, Any]:
        """Once round. Returns what is worth knowing about it."""
        self._seconds.clear()
        with self._timed("weights"):
            self.hand_over(number)
        asked = self.asked(number)
        with self._timed("generate"):
            rollouts = self.generate(number, asked)
        with self._timed("seal"):
            folder = self.seal(number, rollouts)
        with self._timed("score"):
            self.score(folder)
        trained = self.train(number, folder)
        rewards = {r.id: reward(p, decode(r.tokens.tolist())) for r, p in zip(rollouts, asked, strict=True)}
        self.ledger.used(number, self.step, rewards)
        by_domain = list(zip(rollouts, asked, strict=True))
        found = {
            "batch": number + 1,
            "step": self.step,
            **trained,
            "reward": {d: float(np.mean([rewards[r.id] for r, p in by_domain if p.domain == d])) for d in DOMAINS},
            "lengths": {d: _histogram([r for r, p in by_domain if p.domain == d]) for d in DOMAINS},
            "rollouts": len(rollouts),
            "interruptions": sum(r.interruptions for r in rollouts),
            "censored": sum(r.censored is not None for r in rollouts),
            "worker_deaths": self.backend.stats.deaths,
            "versions_behind": [number - v for v in sorted(_versions(rollouts))],
        }
        if (number + 1) % self.config.evaluate_every == 0 or number + 1 == self.config.batches:
            with self._timed("evaluate"):
                found["accuracy"] = self.evaluate()
        return found | {"seconds": dict(self._seconds)}

    # -- the stations -----------------------------------------------------------------------------------------------

    def hand_over(self, version: int) -> None:
        """Make the weights policy version `version`: the one that samples the batch of that number.

        After a restart the log is ahead of the checkpoint: batches up to the version in force were sampled already.
        """
        if self.backend.policy_version < version:
            self.backend.update_weights(self.model.state_dict(), version)

    def asked(self, number: int) -> list[Problem]:
        """The problems of a batch, the domains in turn."""
        half = self.config.rollouts // 2
        start = self.config.seed * _STRIDE + number * 2 * half  # twice as many numbers as are taken: some are held out
        by_domain = [list(islice(problems(d, "train", start=start), half)) for d in DOMAINS]
        return [p for pair in zip(*by_domain, strict=True) for p in pair]

    def generate(self, number: int, asked: Sequence[Problem]) -> list[FinishedRollout]:
        """One rollout of each problem, in their order."""
        prompts = [encode(p.prompt) for p in asked]
        metadata = [{"domain": p.domain} for p in asked]
        seed = (self.config.seed << 32) + number
        rollouts = self.ledger.generate(number, prompts, self.sampling, seed=seed, metadata=metadata)
        if self.config.arm != "restart":
            return rollouts
        # What restarting from scratch amounts to: an interrupted rollout is thrown away, and another one is drawn,
        # until one comes through unhurt. (Here it is finished before it is thrown away; its tokens do not count.)
        for attempt in range(1, 100):
            hurt = [i for i, r in enumerate(rollouts) if r.interruptions]
            if not hurt:
                break
            again = self.ledger.evaluate(
                f"{number}.{attempt}", [prompts[i] for i in hurt], self.sampling, seed=seed + (attempt << 24)
            )
            for i, fresh in zip(hurt, again, strict=True):
                rollouts[i] = replace(fresh, metadata=metadata[i])
        return rollouts

    def seal(self, number: int, rollouts: Sequence[FinishedRollout]) -> Path:
        """A dataset of this batch: small, so that reading its metadata costs the same in every batch."""
        folder = self.job.folder / "data" / f"{number:06d}"
        samples = [routed(to_sample(r, self.backend.info, self.sampling), self.router) for r in rollouts]
        DatasetWriter(folder, writer_id="student", check_fence=self.backend.check_fence).seal(samples)
        return folder

    def score(self, folder: Path) -> None:
        """The teachers' answers, as column groups, in one commit.

        Raises:
            ProvenanceError: scores that were not computed in MXFP4.
        """
        full = self.config.objective == "full_vocabulary"
        wanted = Wanted(logprobs=False, hidden_states=True) if full else Wanted(top_k=_TOP)
        spec = ScoringSpec(wanted, commit_s=1e9, commit_bytes=1 << 40, failures_max=1)
        score_dataset(folder, self.scorer, spec, compression="none", check_fence=self.backend.check_fence)
        dataset = open_dataset(folder)
        for group in self._groups():
            found = set(dataset.provenance(group)["precision"].to_pylist())
            if found != {PRECISION}:
                raise ProvenanceError(
                    problem(
                        f"scores of {group} in {folder} have precision {sorted(found)}, not {PRECISION!r}",
                        consequence="The batch was not trained on",
                        remedy="Serve the teachers with `precision: mxfp4`",
                    )
                )

    def train(self, number: int, folder: Path) -> dict[str, Any]:
        """The optimizer steps of a batch."""
        path = folder / "plan.arrow"
        spec = PlanSpec(token_budget=self.config.step_tokens, seed=number, by_teacher=False)
        with self._timed("load"):
            plan(open_dataset(folder), spec).write(path)
        done, behind, divergence = 0, [], []
        overlap: dict[str, list[float]] = {d: [] for d in DOMAINS}
        self.model.train()
        name = f"{folder}.{self.job.life}"
        with self._timed("load"):  # its reader is a process of its own: most of what loading a small batch costs
            opened = Loader(folder, path, name=name, groups=("tokens", *self._groups()), need_all=False)
        with opened as loader:
            batches = iter(loader)
            while True:
                with self._timed("load"):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    here = [g for g in self._groups() if any(s.group(g) is not None for s in batch.samples)]
                    column = "hidden_states" if self.config.objective == "full_vocabulary" else "logprobs"
                    columns = ["sampling_logprobs", *(f"{g}.{column}" for g in here)]
                    columns += [f"{g}.topk_ids" for g in here if column == "logprobs"]
                    padded = collate_padded(batch.samples, columns)
                with self._timed("train"):
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.learning_rate(number)
                    loss, kl = self.loss(padded, here, overlap)
                    self.optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                behind.append(done)
                divergence.append(kl)
                done += 1
                self.step += 1
        return {
            "divergence": float(np.mean(divergence)),
            "steps_behind": behind,
            "overlap": {d: float(np.mean(v)) for d, v in overlap.items() if v},
        }

    def loss(self, padded: PaddedBatch, groups: Sequence[str], overlap: dict[str, list[float]]) -> tuple[Tensor, float]:
        """The objective of one step, and the mean divergence from the teachers as the objective sees it.

        Full vocabulary: the forward KL. The teachers are all but certain, and a student that is not yet right would
        flee from the tokens it tries under the reverse KL before it finds the right one; accuracy falls at first.
        Sampled: the reverse KL, as no other can be estimated from the student's own tokens.
        """
        hidden_BTH = self.model.model(padded.input_ids, attention_mask=padded.attention_mask.long()).last_hidden_state
        hidden_BTH = hidden_BTH[:, :-1]
        head_VH = self.model.lm_head.weight
        token_BT = padded.input_ids[:, 1:]
        mask_BT = padded.loss_mask[:, 1:]
        with torch.no_grad():
            student_top_BTk = (hidden_BTH @ head_VH.T).topk(_TOP, -1).indices
        if self.config.objective == "full_vocabulary":
            total, count = hidden_BTH.sum() * 0.0, mask_BT.sum()
            for group in groups:
                domain = group.partition(".")[2]
                name = f"{group}.hidden_states"
                rows = padded.masks[name].any(-1)
                mine_BT = mask_BT[rows] & padded.masks[name][rows, 1:]
                teacher_BTH = padded.columns[name][rows, 1:]
                teacher_head_VH = self.head(domain)
                total = total + full_vocabulary_loss(
                    hidden_BTH[rows],
                    head_VH,
                    teacher_BTH,
                    teacher_head_VH,
                    mine_BT,
                    divergence=ForwardKL(),
                    normalizer=count,
                )
                teacher_top = (teacher_BTH.float() @ teacher_head_VH.float().T).topk(_TOP, -1).indices
                overlap[domain].append(_overlap(student_top_BTk[rows], teacher_top, mine_BT))
            return total, float(total.detach())
        logits_BTV = hidden_BTH @ head_VH.T
        logprob_BT = logits_BTV.log_softmax(-1).gather(-1, token_BT[..., None])[..., 0]
        teacher_BT, scored_BT = torch.zeros_like(logprob_BT), torch.zeros_like(mask_BT)
        for group in groups:
            name = f"{group}.logprobs"
            valid_BT = padded.masks[name][:, 1:]
            teacher_BT = torch.where(valid_BT, padded.columns[name][:, 1:], teacher_BT)
            scored_BT |= valid_BT
            overlap[group.partition(".")[2]].append(
                _overlap(student_top_BTk, padded.columns[f"{group}.topk_ids"][:, 1:], mask_BT & valid_BT)
            )
        mask_BT = mask_BT & scored_BT & padded.masks["sampling_logprobs"][:, 1:]
        opinion_BT = opd_advantages(teacher_BT, logprob_BT, mask_BT)
        domains = [padded.masks[f"{group}.logprobs"][:, 1:] for group in groups]
        advantage_BT, kept_BT = weigh(opinion_BT, mask_BT, domains)
        loss = masked_importance_loss(logprob_BT, padded.columns["sampling_logprobs"][:, 1:], advantage_BT, kept_BT)
        return loss, -float(opinion_BT[mask_BT].mean())

    def learning_rate(self, number: int) -> float:
        """Of a batch: a short warm-up, then down in a straight line."""
        c = self.config
        return c.peak_learning_rate * min(1.0, (number + 1) / 3) * max(0.05, 1.0 - number / c.batches)

    def head(self, teacher: str) -> Tensor:
        """A teacher's LM head, fetched once.

        Raises:
            ProvenanceError: it does not belong to an MXFP4 teacher.
        """
        if teacher not in self._heads:
            head = self.scorer.head(teacher)
            if head.provenance.precision != PRECISION:
                raise ProvenanceError(
                    problem(
                        f"the head of {teacher} has precision {head.provenance.precision!r}, not {PRECISION!r}",
                        consequence="The batch was not trained on",
                        remedy="Serve the teachers with `precision: mxfp4`",
                    )
                )
            self._heads[teacher] = head.tensor()
        return self._heads[teacher]

    def checkpoint(self, batches: int) -> None:
        """Durable first, then committed: only then does the log let go of what the checkpoint contains."""
        state = self.ledger.state(batches, self.step)
        folder = save_checkpoint(self.checkpoints, self.model, self.optimizer, state)
        self.ledger.commit(state)
        drop_older(self.checkpoints, folder)
        for path in (self.job.folder / "data").glob("[0-9]*"):
            if int(path.name) < batches:
                shutil.rmtree(path, ignore_errors=True)

    def evaluate(self) -> dict[str, float]:
        """Greedy accuracy on held-out problems."""
        return {domain: accuracy(self.model, asked) for domain, asked in self._held_out.items()}

    # -- inside -----------------------------------------------------------------------------------------------------

    def _groups(self) -> list[str]:
        kind = "hidden" if self.config.objective == "full_vocabulary" else "teacher"
        return [f"{kind}.{domain}" for domain in DOMAINS]

    def _note(self, line: dict[str, Any]) -> None:
        """One line of metrics. Batches that a crash repeats are there twice; the last one counts."""
        with (self.job.folder / METRICS).open("a") as file:
            file.write(json.dumps(line | {"life": self.job.life, "time": time.time()}) + "\n")

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[what] += time.monotonic() - started


def _overlap(student_BTk: Tensor, teacher_BTk: Tensor, mask_BT: Tensor) -> float:
    return float(support_overlap(student_BTk[mask_BT].numpy(), teacher_BTk[mask_BT].numpy().astype(np.int64)).mean())


def _histogram(rollouts: Sequence[FinishedRollout]) -> list[int]:
    """How many rollouts have each length, from 0 on."""
    found: list[int] = np.bincount([len(r.tokens) for r in rollouts], minlength=MAX_ANSWER_TOKENS + 1).tolist()
    return found


def _versions(rollouts: Sequence[FinishedRollout]) -> set[int]:
    return {int(v) for r in rollouts for v in np.unique(r.output.version_T)}


def run(job: Job) -> None:
    """A life of the trainer, in this process."""
    config = job.config
    torch.set_num_threads(1)
    with (
        RolloutBackend(
            job.student, job.folder / "wal", workers=config.workers, slots=config.slots, segment_bytes=1 << 20
        ) as backend,
        ScoringClient([job.server], ClientOptions(backoff_max_s=0.5, window=config.rollouts)) as scorer,
    ):
        student = Student(job, backend, scorer)
        killer = None
        if config.kills and config.hazard:
            # Each life has its own draws, or the workers of every life would die at the same steps.
            killer = BackendKiller(backend, KillSchedule(config.hazard, config.seed * 1000 + job.life))
            killer.start()
        student.run()
        if killer is not None:
            killer.stop()
        balance = backend.balance()
        done = {"balance": str(balance), "holds": balance.holds, "step": student.step}
        temporary = job.folder / ".done.json"
        temporary.write_text(json.dumps(done))
        temporary.rename(job.folder / "done.json")


if __name__ == "__main__":
    die_with_parent()
    run(Job.from_json(Path(sys.argv[1]).read_text()))
