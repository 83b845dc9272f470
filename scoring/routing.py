"""Which teachers score a sample, on which of its tokens, with what weight; and a record of who decided it.

A router looks at a sample and names teachers. Its decision is written down with the sample (`routed`), so that what is
scored later, in another process or again after a crash, follows the record and not a router that may have changed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rollout_wal.dataset import Sample, SegmentKind

from .errors import BadRequest, problem

#: Where the routes of a sample are kept among its `extras`.
ROUTES = "routes"

#: One teacher, or several with their weights.
Choice = str | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Route:
    """A teacher's part in a sample.

    Args:
        teacher: its id.
        weight: above 0; how much its opinion counts in the loss (`scoring.losses.multi_teacher_advantages`).
        spans: (start, end) token ranges of the sample that it scores; None: all that the policy sampled.
    """

    teacher: str
    weight: float = 1.0
    spans: tuple[tuple[int, int], ...] | None = None

    def covers(self, length: int) -> NDArray[np.bool_]:
        """bool [length]: the tokens that it scores, as far as they were sampled."""
        if self.spans is None:
            return np.ones(length, np.bool_)
        covered = np.zeros(length, np.bool_)
        for start, end in self.spans:
            covered[start:end] = True
        return covered


@dataclass(frozen=True, slots=True)
class Decision:
    """Routes, and why these."""

    routes: tuple[Route, ...]
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Routable:
    """What a router sees of a sample.

    Args:
        token_ids: int32 [T], the prompt first.
        segment_kinds: uint8 [T], a `SegmentKind` each.
        extras: what was logged with the prompt.
    """

    key: str
    domain: str
    group: str
    prompt_length: int
    token_ids: NDArray[np.int32]
    segment_kinds: NDArray[np.uint8]
    extras: Mapping[str, Any] = field(default_factory=dict)


class Router(Protocol):
    """Decides. The same id and version decide the same about the same sample."""

    @property
    def id(self) -> str: ...

    @property
    def version(self) -> str: ...

    def route(self, sample: Routable) -> Decision:
        """Raises BadRequest: it has no teacher for the sample."""
        ...


class DomainRouter:
    """By domain label: one teacher (hard), or several with weights.

        DomainRouter({"math": "t-math", "code": {"t-code": 0.8, "t-math": 0.2}}, default="t-general")

    Args:
        table: teachers by domain.
        default: for domains that are not in the table; None: such samples are refused.
        version: of the table; a digest of it unless given.
    """

    id = "domain"

    def __init__(self, table: Mapping[str, Choice], *, default: Choice | None = None, version: str = "") -> None:
        self._table = {domain: _routes(choice) for domain, choice in table.items()}
        self._default = _routes(default) if default is not None else None
        self.version = version or _digest([table, default])

    def route(self, sample: Routable) -> Decision:
        found = self._table.get(sample.domain, self._default)
        if found is None:
            raise BadRequest(
                problem(
                    f"sample {sample.key!r} has domain {sample.domain!r}, which the router does not know",
                    consequence="It was not routed",
                    remedy=f"Add the domain to {sorted(self._table)}, or give a default teacher",
                )
            )
        default = "" if sample.domain in self._table else ", by default"
        return Decision(found, f"domain {sample.domain!r}{default}")


class SegmentRouter:
    """By kind of segment: tool calls to one teacher, answers to another, within one sample.

    Args:
        table: teachers by the kind of the tokens that they score.
        default: for sampled tokens of other kinds; None: nobody scores them.
    """

    id = "segment"

    def __init__(
        self, table: Mapping[SegmentKind, Choice], *, default: Choice | None = None, version: str = ""
    ) -> None:
        self._table = {SegmentKind(kind): _routes(choice) for kind, choice in table.items()}
        self._default = _routes(default) if default is not None else ()
        self.version = version or _digest([{k.name: c for k, c in table.items()}, default])

    def route(self, sample: Routable) -> Decision:
        kinds = sample.segment_kinds
        spans: dict[tuple[str, float], list[tuple[int, int]]] = {}
        ends = np.flatnonzero(np.diff(kinds)) + 1
        for start, end in zip([0, *ends.tolist()], [*ends.tolist(), len(kinds)]):
            if start == end or start < sample.prompt_length:
                continue
            for route in self._table.get(SegmentKind(int(kinds[start])), self._default):
                spans.setdefault((route.teacher, route.weight), []).append((start, end))
        routes = tuple(Route(teacher, weight, tuple(found)) for (teacher, weight), found in spans.items())
        return Decision(routes, f"segments of {len({r.teacher for r in routes})} teachers")


@dataclass(frozen=True, slots=True)
class FunctionRouter:
    """A function as a router. Change the version when the function changes: it is what the record names."""

    function: Callable[[Routable], Decision]
    id: str
    version: str

    def route(self, sample: Routable) -> Decision:
        return self.function(sample)


def checked(decision: Decision, sample: Routable) -> Decision:
    """Raises BadRequest: a weight that is none, spans outside the sample, a teacher twice on the same token."""
    seen: dict[str, NDArray[np.bool_]] = {}
    wrong = None
    length = len(sample.token_ids)
    for route in decision.routes:
        if not (0.0 < route.weight < math.inf) or not route.teacher:
            wrong = f"teacher {route.teacher!r} with weight {route.weight!r}"
        elif route.spans is not None and not all(0 <= s < e <= length for s, e in route.spans):
            wrong = f"spans {route.spans[:5]} of {length} tokens"
        else:
            before = seen.setdefault(route.teacher, np.zeros(length, np.bool_))
            if bool((before & route.covers(length)).any()):
                wrong = f"teacher {route.teacher!r} twice on the same tokens"
            before |= route.covers(length)
    if wrong:
        raise BadRequest(
            problem(
                f"the router decided on {wrong} for sample {sample.key!r}",
                consequence="The sample was not routed",
                remedy="Correct the router: weights above 0, spans within the sample, each teacher once on a token",
            )
        )
    return decision


def routed(sample: Sample, router: Router) -> Sample:
    """The sample with its teachers, and with who decided on them: to be sealed like this.

    Raises:
        BadRequest: the router has no teacher for it, or names one in a way that cannot be followed.
    """
    seen = Routable(
        sample.key,
        sample.domain,
        sample.group,
        sample.prompt_length,
        sample.token_ids,
        sample.segment_kinds,
        sample.extras,
    )
    decision = checked(router.route(seen), seen)
    return replace(
        sample,
        teachers=tuple(dict.fromkeys(route.teacher for route in decision.routes)),
        router_id=router.id,
        router_version=router.version,
        router_reason=decision.reason,
        extras={**sample.extras, ROUTES: [[r.teacher, r.weight, r.spans] for r in decision.routes]},
    )


def recorded(teachers: Sequence[str], extras: Mapping[str, Any]) -> tuple[Route, ...]:
    """The routes that a sample's metadata holds: those that a router wrote down, or its teachers as equals."""
    if ROUTES in extras:
        return tuple(
            Route(str(t), float(w), None if spans is None else tuple((int(s), int(e)) for s, e in spans))
            for t, w, spans in extras[ROUTES]
        )
    return tuple(Route(teacher) for teacher in teachers)


def _routes(choice: Choice) -> tuple[Route, ...]:
    return (Route(choice),) if isinstance(choice, str) else tuple(Route(t, float(w)) for t, w in choice.items())


def _digest(table: Any) -> str:
    return hashlib.blake2b(json.dumps(table, sort_keys=True, default=dict).encode(), digest_size=8).hexdigest()
