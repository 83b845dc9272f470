"""Specialists and the student that starts from little: `python -m rollout_wal.trainers.mopd.school FOLDER NAME JSON`.

Each is a process of its own, so that two cores make two models at once. Progress goes to standard output, a number of
steps per line.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import torch

from rollout_kernels.quantize_folder import quantize_folder

from ...engines.hf.weights import no_progress_bars
from .config import School
from .models import accuracy, make_model, save_model, teach
from .tasks import DOMAINS, Domain, Problem, problems

STUDENT = "student"
NAMES: tuple[str, ...] = (*DOMAINS, STUDENT)
#: Entries of the generators from here on are for lessons; the student's rollouts begin at 0.
_LESSONS = 1 << 29
_HELD_OUT = 500
#: Share of the student's examples that are wrong, always in the same way. What it says most often is then wrong, and
#: what is right is among what it samples: the state in which on-policy distillation finds a student.
_MISTAKES = 0.6


def steps_of(name: str, school: School) -> int:
    """Optimizer steps that make a model."""
    return {"addition": school.addition_steps, "sorting": school.sorting_steps}.get(name, school.student_steps)


def mistaken(problem: Problem) -> Problem:
    """The same problem with a wrong answer: one too much, or sorted the other way round."""
    wrong = str(int(problem.answer) + 1) if problem.domain == "addition" else problem.answer[::-1]
    return replace(problem, answer=wrong)


def make(folder: Path, name: str, school: School) -> None:
    """Teach one model and save it: FOLDER/NAME, for a specialist also FOLDER/NAME-mxfp4, and FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    domains: Sequence[Domain] = DOMAINS if name == STUDENT else [d for d in get_args(Domain) if d == name]
    # Sorting is learned from fewer examples than addition; the student is to begin alike with both.
    shares = {"addition": 5, "sorting": 3} if name == STUDENT else dict.fromkeys(domains, 1)
    rng = random.Random(school.seed)
    streams = [(problems(d, "train", start=_LESSONS + (school.seed << 22)), shares[d]) for d in domains]
    unit = school.batch // sum(shares.values())

    def batch(_: int) -> list[Problem]:
        found = [p for stream, share in streams for p in islice(stream, share * unit)]
        return [mistaken(p) if name == STUDENT and rng.random() < _MISTAKES else p for p in found]

    model = make_model(school.seed * len(NAMES) + NAMES.index(name))
    teach(model, batch, steps_of(name, school), on_step=lambda step: print(step, flush=True))
    saved = save_model(model, folder / name)
    found = {"accuracy": {d: accuracy(model, list(islice(problems(d, "held_out"), _HELD_OUT))) for d in DOMAINS}}
    if name != STUDENT:
        packed = folder / f"{name}-mxfp4"
        quantize_folder(saved, packed)
        from rollout_kernels.model import load_packed_model

        with no_progress_bars():
            teacher = load_packed_model(packed, dtype=torch.bfloat16)
        found["accuracy_mxfp4"] = {
            d: accuracy(teacher, list(islice(problems(d, "held_out"), _HELD_OUT))) for d in domains
        }
    temporary = folder / f".{name}.json"
    temporary.write_text(json.dumps(found))
    temporary.rename(folder / f"{name}.json")  # the mark that all of it is there


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]), sys.argv[2], School(**json.loads(sys.argv[3])))
