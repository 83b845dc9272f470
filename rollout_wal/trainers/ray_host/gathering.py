"""A cohort whose members are named one at a time, by callers that know one prompt each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from ...errors import CohortMismatch, problem
from ...params import SamplingParams

#: In a rollout's metadata: the digest of what was asked for, and how it was sampled.
ASKED: Final = "rollout_wal.asked"
SAMPLING: Final = "rollout_wal.sampling"


@dataclass(frozen=True, slots=True)
class Request:
    """What all callers of one cohort must agree on."""

    size: int
    group_size: int
    seed: int | None
    sampling: SamplingParams

    def digest(self, prompt: list[int]) -> str:
        """Of this request for a member with this prompt."""
        parts = [prompt, self.sampling.to_dict(), self.size, self.group_size, self.seed]
        packed: bytes = msgpack.packb(parts)
        return hashlib.sha256(packed).hexdigest()[:32]


@dataclass(slots=True)
class Gathering:
    """Until all members have been named. Those who wait for it await `begun`, then look at `error`."""

    request: Request
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    _prompts: dict[int, list[int]] = field(default_factory=dict)
    _metadata: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, index: int, prompt: list[int], request: Request, metadata: Mapping[str, Any] | None) -> bool:
        """Name one member, perhaps once more. False: it does not fit to what was named before."""
        whole = request.group_size > 0 and request.size % request.group_size == 0
        if request != self.request or not whole or not 0 <= index < request.size:
            return False
        if self._prompts.get(index, prompt) != prompt:
            return False
        self._prompts[index] = prompt
        if index % request.group_size == 0:
            marks = {ASKED: request.digest(prompt), SAMPLING: request.sampling.to_dict()}
            self._metadata[index // request.group_size] = {**(metadata or {}), **marks}
        return True

    @property
    def complete(self) -> bool:
        return len(self._prompts) == self.request.size

    def groups(self) -> tuple[list[list[int]], list[dict[str, Any]]] | None:
        """The prompt and the metadata of each group; None: the prompts of a group differ."""
        step = self.request.group_size
        first = [self._prompts[i] for i in range(0, self.request.size, step)]
        if any(self._prompts[i] != first[i // step] for i in range(self.request.size)):
            return None
        return first, [self._metadata[g] for g in range(len(first))]

    def end(self, error: Exception | None = None) -> None:
        """Let those go who wait."""
        self.error = error
        self.begun.set()


def mismatch(cohort: str, index: int) -> CohortMismatch:
    return CohortMismatch(
        problem(
            f"member {index} of cohort {cohort!r} was asked for with another prompt or other parameters before",
            consequence="Nothing was sampled for this call",
            remedy="Ask for the same again, which needs the same order of the data, or use another name",
        )
    )
