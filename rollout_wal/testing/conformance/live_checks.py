"""Any backend at all, behind four verbs: submitted, interrupted, collected, closed.

Nothing is assumed of how it recovers. What it may not do is lose a rollout, hand one out twice, or, where its noise is
a function of (seed, position), hand out another one than it would have uninterrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from ...params import SamplingParams
from .settings import Conformance, close_logprobs, require, same_tokens, valid_logprobs

InterruptKind = Literal["kill", "preempt"]
"""kill: without warning (SIGKILL, a dropped connection). preempt: with notice (SIGTERM)."""


class LiveRollout(Protocol):
    """One rollout that is accounted for. `rollout_wal.audit.backends.Finished` is one."""

    @property
    def rollout_id(self) -> int: ...

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[float]:
        """One per token, or empty where the backend has none."""
        ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def interruptions(self) -> int: ...

    @property
    def censored(self) -> str:
        """ "" if it was delivered, else why not."""
        ...


class LiveBackend(Protocol):
    """What the checks, and the length-bias audit, ask of a backend. One thread calls it."""

    def submit(self, prompt_tokens: Sequence[int], sampling: SamplingParams, seed: int) -> int:
        """Queue a rollout and return its id at once."""
        ...

    def interrupt(self, kind: InterruptKind) -> None:
        """Interrupt whatever runs now, as a failure would. Return when it has happened; recovery goes on by itself."""
        ...

    def collect(self) -> Iterable[LiveRollout]:
        """What has been accounted for since the last call. Returns soon, also with nothing."""
        ...

    def close(self) -> None: ...


#: name -> (when, kinds): "submitted": right after the last submission; "delivered": when the first rollout is out;
#: a number: after that share of the time that the uninterrupted run took.
LIVE_DEATHS: dict[str, tuple[tuple[str | float, InterruptKind], ...]] = {
    "before the first token": (("submitted", "kill"),),
    "while they run": ((0.3, "kill"),),
    "after the first delivery": (("delivered", "kill"),),
    "with notice": ((0.3, "preempt"),),
    "twice in a row": (("submitted", "kill"), ("submitted", "kill")),
    "again and again": (("submitted", "kill"), (0.2, "preempt"), ("delivered", "kill"), (0.5, "kill"), (0.8, "kill")),
}
#: For as long a backend is listened to after its last rollout, for what must not come.
_AFTERMATH_S = 0.3
_POLL_S = 0.002


@dataclass(slots=True)
class LiveRun:
    """What came out, by number of submission, in order of arrival."""

    rollouts: list[tuple[int, LiveRollout]] = field(default_factory=list)
    interruptions: int = 0
    seconds: float = 0.0

    def by_number(self) -> dict[int, LiveRollout]:
        return dict(self.rollouts)


def run_live(
    make: Callable[[], LiveBackend],
    settings: Conformance,
    deaths: Sequence[tuple[str | float, InterruptKind]] = (),
    *,
    calm_s: float = 0.0,
) -> LiveRun:
    """Four rollouts of each prompt, with seeds 0, 1, ...; interrupted as told."""
    backend = make()
    run, waiting = LiveRun(), list(deaths)
    numbers: dict[int, int] = {}
    sampling = SamplingParams(max_tokens=settings.max_tokens)
    begun = time.monotonic()
    try:
        for number in range(4 * len(settings.prompts)):
            prompt = settings.prompts[number % len(settings.prompts)]
            rollout_id = backend.submit(prompt, sampling, number)
            require(rollout_id not in numbers, f"submit returned the id {rollout_id} twice")
            numbers[rollout_id] = number
        quiet_since = None
        while quiet_since is None or time.monotonic() - quiet_since < _AFTERMATH_S:
            now = time.monotonic()
            require(
                now - begun < settings.timeout_s,
                f"{len(numbers) - len(run.rollouts)} of {len(numbers)} rollouts did not come within "
                f"{settings.timeout_s:g} s",
            )
            while waiting and _due(waiting[0][0], run, (now - begun) / calm_s if calm_s else 0.0):
                backend.interrupt(waiting.pop(0)[1])
                run.interruptions += 1
            for finished in backend.collect():
                known = finished.rollout_id in numbers
                require(known, f"rollout {finished.rollout_id} was delivered and never submitted")
                run.rollouts.append((numbers[finished.rollout_id], finished))
            if quiet_since is None and len({n for n, _ in run.rollouts}) == len(numbers):
                run.seconds = time.monotonic() - begun
                quiet_since = time.monotonic()
            time.sleep(_POLL_S)
    finally:
        backend.close()
    return run


def _due(when: str | float, run: LiveRun, share: float) -> bool:
    return when == "submitted" or (bool(run.rollouts) if when == "delivered" else share >= float(when))


def each_once_live(run: LiveRun, settings: Conformance) -> None:
    """Each rollout once, whole, with a reason for its end and as many logprobs as tokens."""
    numbers = [number for number, _ in run.rollouts]
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    require(not twice, f"rollouts {twice} were delivered more than once")
    missing = sorted(set(range(4 * len(settings.prompts))) - set(numbers))
    require(not missing, f"rollouts {missing} were never delivered")
    for number, r in run.rollouts:
        require(not r.censored, f"rollout {number} was censored: {r.censored}")
        require(0 < len(r.tokens) <= settings.max_tokens, f"rollout {number} has {len(r.tokens)} tokens")
        require(bool(r.finish_reason), f"rollout {number} has no finish reason")
        require(
            len(r.logprobs) in (0, len(r.tokens)),
            f"rollout {number}: {len(r.logprobs)} logprobs, {len(r.tokens)} tokens",
        )
        valid_logprobs(np.asarray(r.logprobs, np.float64), settings, f"rollout {number}")
        require(r.interruptions <= run.interruptions, f"rollout {number} counts more interruptions than were made")


def live_survives(
    make: Callable[[], LiveBackend],
    settings: Conformance,
    deaths: Sequence[tuple[str | float, InterruptKind]],
    calm: LiveRun,
    *,
    keyed: bool,
) -> None:
    """The interrupted run delivers each rollout once; with keyed noise, those of the uninterrupted run."""
    run = run_live(make, settings, deaths, calm_s=calm.seconds)
    require(run.interruptions > 0, "it was over before it could be interrupted: nothing was shown; use longer rollouts")
    each_once_live(run, settings)
    if not keyed:
        return
    twins, mine = calm.by_number(), run.by_number()
    order = sorted(twins)
    same_tokens(
        [list(mine[n].tokens) for n in order], [list(twins[n].tokens) for n in order], settings, "interrupted rollouts"
    )
    for n in order:
        if list(mine[n].tokens) == list(twins[n].tokens) and len(mine[n].logprobs) == len(twins[n].logprobs):
            close_logprobs(mine[n].logprobs, twins[n].logprobs, settings, f"rollout {n}")
            same_end = mine[n].finish_reason == twins[n].finish_reason
            require(same_end, f"rollout {n} ended as {mine[n].finish_reason!r}, not {twins[n].finish_reason!r}")
