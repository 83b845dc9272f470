"""TRL's distillation trainer with teachers behind a real scoring server, by log-probabilities and by hidden states."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'trl'")

from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig

from rollout_kernels import logprobs
from rollout_kernels.linear_divergence import functional as linear_divergence
from rollout_wal.backend import RolloutBackend
from rollout_wal.errors import BadInput
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ledger import read_state
from rollout_wal.trainers.trl import DistillationTrainer
from scoring.client import ScoringClient
from scoring.errors import ScoreProvenanceMismatch
from scoring.losses import gkd_loss
from scoring.residency import Residency
from scoring.scheduler import Scheduler
from scoring.server import ServerOptions, serve
from scoring.teachers.hf import HfTeacherSource

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

TEACHERS = {"adder": 1, "sorter": 2}
#: Served, too; its tokenizer is not the student's.
STRANGER = "stranger"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    seeds = {"student": 0, **TEACHERS, STRANGER: 3}
    made = {name: make_tiny_model(folder / name, mean_length=20.0, seed=seed) for name, seed in seeds.items()}
    for name in TEACHERS:
        shutil.copy(made["student"] / "tokenizer.json", made[name])
    return made


@pytest.fixture(scope="module")
def backend(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutBackend]:
    with RolloutBackend(models["student"], tmp_path_factory.mktemp("wal"), slots=8) as running:
        yield running


@pytest.fixture(scope="module")
def scorer(models: dict[str, Path]) -> Iterator[ScoringClient]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Any:
        sources = [HfTeacherSource(name, models[name], precision="float32") for name in (*TEACHERS, STRANGER)]
        sizes = {s.info.id: s.info.nbytes for s in sources}
        return await serve(Scheduler(sources, Residency(sizes, sum(sizes.values()))), ServerOptions())

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    with ScoringClient([f"127.0.0.1:{server.port}"]) as client:
        yield client
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def trainer(
    models: dict[str, Path], backend: RolloutBackend, scorer: ScoringClient, tmp_path: Path
) -> Callable[..., DistillationTrainer]:
    def make(
        objective: str, *, config: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **options: Any
    ) -> DistillationTrainer:
        """`config`: of TRL's; `model`: of the student's configuration."""
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_completion_length": 16,
            "max_steps": 40,
            "lr_scheduler_type": "constant",
            "learning_rate": 3e-3,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 5,
        }
        args = DistillationConfig(**settings | (config or {}))
        rows = [{"prompt": f"question {i}", "teacher": sorted(TEACHERS)[i % 2]} for i in range(8)]
        student = AutoModelForCausalLM.from_pretrained(models["student"], dtype="float32")
        for name, value in (model or {}).items():
            setattr(student.config, name, value)
        return DistillationTrainer(
            student,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(models["student"]),
            backend=backend,
            scorer=scorer,
            objective=objective,
            run=tmp_path.name,
            **options,
        )

    return make


@pytest.mark.parametrize("objective", ["sampled", "full_vocabulary"])
def test_the_loss_is_that_of_the_teachers_themselves(
    objective: str, trainer: Callable[..., DistillationTrainer], models: dict[str, Path], backend: RolloutBackend
) -> None:
    """Scores by way of the service give the gradient that a plain forward of each teacher gives."""
    made = trainer(objective)
    made.model.train()
    made._ledger.restore(None)
    rows = [dict(made.train_dataset[i]) for i in range(4)]
    inputs = made._generate_and_score_completions(rows)
    loss, _, tokens = made._compute_loss(made.model, inputs, None)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()

    total = torch.zeros(())
    assert int(tokens) == sum(len(r.tokens) for r in made._last)
    for row, rollout in zip(rows, made._last, strict=True):
        teacher = AutoModelForCausalLM.from_pretrained(models[row["teacher"]], dtype="float32").eval()
        ids = torch.from_numpy(np.concatenate([rollout.prompt, rollout.tokens]).astype(np.int64))[None]
        at = slice(len(rollout.prompt) - 1, -1)
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[0, at].log_softmax(-1)
        found = made.model(input_ids=ids).logits[0, at].log_softmax(-1)
        drawn = ids[0, len(rollout.prompt) :, None]
        if objective == "sampled":
            student = found.gather(-1, drawn)
            total = total - ((wanted.gather(-1, drawn) - student).detach() * student).sum() / tokens
        else:
            total = total + (found.exp() * (found - wanted)).sum() / tokens
    total.backward()
    # Hidden states travel in bfloat16; log-probabilities in float32.
    rtol, atol = (1e-4, 1e-6) if objective == "sampled" else (5e-2, 2e-4)
    torch.testing.assert_close(loss, total, rtol=rtol, atol=1e-2 if objective != "sampled" else 1e-5)
    for name, parameter in made.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=rtol, atol=atol)


def test_tokens_count_by_how_likely_they_have_become(trainer: Callable[..., DistillationTrainer]) -> None:
    made = trainer("sampled")
    made.model.train()
    made._ledger.restore(None)
    rows = [dict(made.train_dataset[i]) for i in range(2)]
    inputs = made._generate_and_score_completions(rows)
    sampled_BC = inputs["sampling_logprobs"]

    def gradient(less_likely: float) -> torch.Tensor:
        """By a policy that sampled each token with a probability so many times smaller."""
        made.model.zero_grad()
        loss, _, _ = made._compute_loss(made.model, inputs | {"sampling_logprobs": sampled_BC - less_likely}, None)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in made.model.parameters()])

    on_policy = gradient(0.0)
    assert on_policy.abs().max() > 0
    torch.testing.assert_close(gradient(float(np.log(1.5))), 1.5 * on_policy, rtol=1e-3, atol=1e-6)
    assert not gradient(float(np.log(2.5))).any()  # too far from it to learn from


@pytest.mark.parametrize("objective", ["sampled", "full_vocabulary"])
def test_stale_tokens_are_left_out(objective: str, trainer: Callable[..., DistillationTrainer]) -> None:
    made = trainer(objective, max_staleness=1)
    made.model.train()
    made._ledger.restore(None)
    rows = [dict(made.train_dataset[i]) for i in range(2)]
    made._generate_and_score_completions(rows)
    begun = {"policy_version": made._policy_version(made._last[0]) + 2}
    newer_T = np.arange(len(made._last[0].tokens)) > 1
    output = made._last[0].output
    stale = replace(made._last[0], metadata=begun, output=replace(output, version_T=output.version_T + newer_T))
    [score] = made._score([stale], [rows[0]["teacher"]])
    assert made._used(stale, score).tolist() == newer_T.tolist()


@pytest.mark.parametrize("objective", ["sampled", "full_vocabulary"])
def test_logits_are_never_there_at_once(
    objective: str, trainer: Callable[..., DistillationTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(objective)
    made.model.train()
    made._ledger.restore(None)
    inputs = made._generate_and_score_completions([dict(made.train_dataset[i]) for i in range(8)])
    vocabulary, hidden = made.model.config.vocab_size, made.model.config.hidden_size
    for module, name in ((logprobs, "_BUFFER_BYTES_CPU_HEAD"), (linear_divergence, "_BUFFER_BYTES_CPU")):
        monkeypatch.setattr(module, name, 4 * vocabulary * 4)  # four tokens' logits
    assert int(inputs["scored_mask"].sum()) > 4
    with _OverVocabulary(vocabulary) as seen:
        loss, _, _ = made._compute_loss(made.model, inputs, None)
        loss.backward()
    assert 4 in seen.rows
    assert max(seen.rows - {hidden}) == 4  # a head, transposed, has as many rows as the hidden states are wide


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sampled", "full_vocabulary"])
def test_the_student_comes_closer(
    objective: str, trainer: Callable[..., DistillationTrainer], models: dict[str, Path]
) -> None:
    def distance(model: Any) -> float:
        tokenizer = AutoTokenizer.from_pretrained(models["student"])
        total = 0.0
        for index, name in enumerate(sorted(TEACHERS)):
            ids = tokenizer(f"question {index}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                student = model(input_ids=ids).logits.log_softmax(-1)
                teacher = AutoModelForCausalLM.from_pretrained(models[name], dtype="float32")(input_ids=ids)
                total += float((student.exp() * (student - teacher.logits.log_softmax(-1))).sum(-1).mean())
        return total

    made = trainer(objective)
    before = distance(made.model.eval())
    made.train()
    assert distance(made.model.eval()) < 0.9 * before


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_divergence_is_that_of_trls_beta(
    beta: float, trainer: Callable[..., DistillationTrainer], models: dict[str, Path]
) -> None:
    made = trainer("full_vocabulary", config={"beta": beta})
    made.model.train()
    made._ledger.restore(None)
    rows = [dict(made.train_dataset[i]) for i in range(2)]
    inputs = made._generate_and_score_completions(rows)
    loss, _, tokens = made._compute_loss(made.model, inputs, None)
    total = torch.zeros(())
    for row, rollout in zip(rows, made._last, strict=True):
        teacher = AutoModelForCausalLM.from_pretrained(models[row["teacher"]], dtype="float32").eval()
        ids = torch.from_numpy(np.concatenate([rollout.prompt, rollout.tokens]).astype(np.int64))[None]
        at = slice(len(rollout.prompt) - 1, -1)
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[:, at] for m in (teacher, made.model))
            total += gkd_loss(q, p, torch.ones(q.shape[:2], dtype=torch.bool), beta=beta, reduction="sum") / tokens
    torch.testing.assert_close(loss.detach(), total, rtol=5e-2, atol=1e-2)


def test_a_restart_expects_the_teachers_that_the_checkpoint_had(
    trainer: Callable[..., DistillationTrainer], scorer: ScoringClient, tmp_path: Path
) -> None:
    made = trainer("sampled", config={"max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    made.train()
    state = read_state(tmp_path / "out" / "checkpoint-1")
    assert state["teachers"] == dict(scorer.pins)
    assert set(state["teachers"]) == set(TEACHERS)
    again = trainer("sampled", config={"max_steps": 2})
    again._scorer = ScoringClient(["127.0.0.1:1"], pins={"adder": "on purpose"})
    again._take_up(state)
    assert again._scorer.pins == {"adder": "on purpose", "sorter": state["teachers"]["sorter"]}


def test_a_teacher_with_another_tokenizer_is_refused(trainer: Callable[..., DistillationTrainer]) -> None:
    made = trainer("sampled")
    made.model.train()
    made._ledger.restore(None)
    with pytest.raises(ScoreProvenanceMismatch, match="tokenizer_digest of teacher 'stranger'"):
        made._generate_and_score_completions([{"prompt": "question", "teacher": STRANGER}])


def test_what_cannot_be_honoured(trainer: Callable[..., DistillationTrainer], models: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"beta=0\.5 with objective='sampled'"):
        trainer("sampled", config={"beta": 0.5})
    with pytest.raises(BadInput, match=r"logit_scale=0\.25"):
        trainer("sampled", model={"logit_scale": 0.25})
    with pytest.raises(BadInput, match="objective='both' is not known"):
        trainer("both")
    with pytest.raises(BadInput, match="teacher_model and a rollout backend"):
        trainer("sampled", teacher_model=str(models["adder"]))
    made = trainer("sampled", route=lambda row: str(row["nowhere"]) if "nowhere" in row else _none(row))
    made.model.train()
    made._ledger.restore(None)
    made._step = 1000
    with pytest.raises(BadInput, match="names no teacher"):
        made._generate_and_score_completions([{"prompt": "question"}])


class _OverVocabulary(TorchDispatchMode):
    """How many rows tensors over the vocabulary have."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self._vocabulary:
                self.rows.add(tensor.numel() // self._vocabulary)
        return out


def _none(row: Any) -> str:
    from rollout_wal.trainers.trl.distillation import _teacher_column

    return _teacher_column({k: v for k, v in row.items() if k != "teacher"})
