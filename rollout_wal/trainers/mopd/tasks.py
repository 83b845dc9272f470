"""Two kinds of problems from reasoning-gym, in a form short enough for a model of half a megabyte.

    addition   chain_sum        "4 - 1 + 7 ="                        ->  prompt 4-1+7=   answer 10
    sorting    number_sorting   "Sort ... descending: 5.0, 2.0, 7.0" ->  prompt 527>     answer 752

Problems are numbered; number n of a split is the same problem on every machine. The two splits share no prompt.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ...errors import MissingExtra

Domain = Literal["addition", "sorting"]
DOMAINS: tuple[Domain, ...] = ("addition", "sorting")
Split = Literal["train", "held_out"]

#: One prompt in so many is held out, by its checksum.
_HELD_OUT_EVERY = 8
#: Problems of a domain that numbers run through before they repeat.
_SIZE = 1 << 30
_OPTIONS: dict[Domain, tuple[str, dict[str, Any]]] = {
    "addition": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "sorting": (
        "number_sorting",
        {
            "min_numbers": 3,
            "max_numbers": 6,
            "min_decimals": 0,
            "max_decimals": 0,
            "min_value": 0.0,
            "max_value": 9.0,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `prompt` and `answer` are in the short form; `entry` is reasoning-gym's own."""

    domain: Domain
    prompt: str
    answer: str
    entry: dict[str, Any]


def problems(domain: Domain, split: Split, *, start: int = 0) -> Iterator[Problem]:
    """Problems of a split without end, in the order of their numbers, from entry `start` of the generator on."""
    made = _generator(domain)
    for index in range(start, _SIZE):
        problem = _shorten(domain, made[index])
        if (zlib.crc32(problem.prompt.encode()) % _HELD_OUT_EVERY == 0) == (split == "held_out"):
            yield problem


def reward(problem: Problem, text: str) -> float:
    """1.0 if reasoning-gym's verifier accepts the answer and it is exactly right, else 0.0.

    The second condition is there because `number_sorting` accepts numbers that are off by one.
    """
    answer = str([f"{c}.0" for c in text]) if problem.domain == "sorting" else text
    accepted = float(_generator(problem.domain).score_answer(answer, problem.entry)) == 1.0
    return float(accepted and text == problem.answer)


@cache
def _generator(domain: Domain) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies' deprecations; nothing of ours
            import reasoning_gym
    except ImportError:
        raise MissingExtra("reasoning_gym", "demo", "the demo's prompts") from None
    name, options = _OPTIONS[domain]
    return reasoning_gym.create_dataset(name, size=_SIZE, seed=0, **options)


def _shorten(domain: Domain, entry: dict[str, Any]) -> Problem:
    meta = entry["metadata"]
    if domain == "addition":
        return Problem(domain, f"{meta['expression'].replace(' ', '')}=", str(entry["answer"]), entry)
    digits = "".join(_digit(number) for number in meta["original_numbers"])
    order = "<" if meta["direction"] == "ascending" else ">"
    return Problem(domain, f"{digits}{order}", "".join(_digit(n) for n in meta["sorted_numbers"]), entry)


def _digit(number: str) -> str:
    return str(int(float(number)))
