"""What a run is, as plain data that travels to processes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Objective = Literal["sampled", "full_vocabulary"]
OBJECTIVES: tuple[Objective, ...] = ("sampled", "full_vocabulary")
Arm = Literal["killed", "unkilled", "restart"]
#: restart: killed like "killed", but what was interrupted is thrown away and sampled again from scratch.
ARMS: tuple[Arm, ...] = ("killed", "unkilled", "restart")
#: Learning rate and tokens of an optimizer step. A sampled log-probability says little of a token and is noisy: with
#: steps on fewer tokens, or at a higher rate, the student flees from all it tries, right answers included.
_STEPS: dict[Objective, tuple[float, int]] = {"sampled": (3e-4, 500), "full_vocabulary": (4e-4, 300)}


@dataclass(frozen=True, slots=True)
class School:
    """How specialists and student are made, by supervised examples, before anything is distilled.

    Args:
        addition_steps, sorting_steps: of the two specialists, each on its own domain.
        student_steps: of the student, on both domains, most answers of its examples being wrong.
        batch: examples of a step.
    """

    addition_steps: int = 600
    sorting_steps: int = 400
    student_steps: int = 1200
    batch: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StudentConfig:
    """The student's run, but for where things are.

    Args:
        batches: generation batches; each is one policy version.
        rollouts: of a batch, half of them in each domain.
        token_budget: tokens of an optimizer step; a batch makes as many steps as it takes.
        learning_rate: where it begins, after a warm-up. For both, None is what suits the objective.
        checkpoint_every, evaluate_every: in batches.
        held_out: problems of each domain that are evaluated.
        hazard: probability that a rollout worker is killed at an engine step.
        trainer_kills, server_kills: over the run, at moments drawn from the seed.
        teacher_token_budget: tokens of a teacher's forward. 1 scores every rollout by itself, so that scores do not
            depend on what else was asked for at the time.
    """

    objective: Objective = "sampled"
    arm: Arm = "killed"
    seed: int = 0
    batches: int = 40
    rollouts: int = 512
    token_budget: int | None = None
    learning_rate: float | None = None
    checkpoint_every: int = 4
    evaluate_every: int = 4
    held_out: int = 200
    workers: int = 2
    slots: int = 256
    hazard: float = 0.02
    trainer_kills: int = 3
    server_kills: int = 2
    teacher_token_budget: int = 4096

    @property
    def kills(self) -> bool:
        return self.arm != "unkilled"

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or _STEPS[self.objective][0]

    @property
    def step_tokens(self) -> int:
        return self.token_budget or _STEPS[self.objective][1]


@dataclass(frozen=True, slots=True)
class Job:
    """A student's run and where it is: what the trainer's process is given.

    Args:
        folder: of this run: log, dataset, checkpoints, metrics.
        student: model folder that it starts from.
        server: host:port of the teachers.
        life: how often the trainer was started before.
    """

    config: StudentConfig
    folder: Path
    student: Path
    server: str
    life: int = 0

    def to_json(self) -> str:
        raw = asdict(self) | {"folder": str(self.folder), "student": str(self.student)}
        return json.dumps(raw)

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw: dict[str, Any] = json.loads(text)
        return cls(
            StudentConfig(**raw["config"]), Path(raw["folder"]), Path(raw["student"]), raw["server"], raw["life"]
        )
