"""Specialists and the student that starts from little: `python -m rollout_wal.trainers.mopd.school FOLDER NAME JSON`.

Each is a process of its own, so that two cores make two models at once. Progress goes to standard output, a number of
steps per line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

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


def steps_of(name: str, school: School) -> int:
    """Optimizer steps that make a model."""
    return {"addition": school.addition_steps, "sorting": school.sorting_steps}.get(name, school.student_steps)


def make(folder: Path, name: str, school: School) -> None:
    """Teach one model and save it: FOLDER/NAME, for a specialist also FOLDER/NAME-mxfp4, and FOLDER/NAME.json."""
    import torch

    torch.set_num_threads(1)
    domains: Sequence[Domain] = DOMAINS if name == STUDENT else [d for d in get_args(Domain) if d == name]
    share = school.batch // len(domains)
    streams = [problems(d, "train", start=_LESSONS + (school.seed << 22)) for d in domains]

    def batch(_: int) -> list[Problem]:
        return [p for stream in streams for p in islice(stream, share)]

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
    make(Path(sys.argv[1]), sys.argv[2], School(**json.loads(sys.argv[3])))
