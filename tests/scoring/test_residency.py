"""Which teachers are loaded, and whose turn it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.errors import BadConfiguration
from scoring.residency import Residency, Waiting


def test_teachers_that_never_fit_are_refused() -> None:
    with pytest.raises(BadConfiguration, match="does not fit"):
        Residency({"a": 5, "b": 6}, 10, pinned=["a"])
    with pytest.raises(BadConfiguration):
        Residency({"a": 5}, 10, pinned=["nobody"])
    Residency({"a": 5, "b": 5}, 10, pinned=["a"])


def test_work_of_those_in_memory_goes_first_until_somebody_waited_too_long() -> None:
    residency = Residency({"a": 1, "b": 1}, 1, max_wait_s=10.0)
    residency.reserve("a")
    residency.loaded("a", 0.0, 0.0)
    queues = {"a": Waiting(5, 8.0), "b": Waiting(500, 1.0)}
    assert residency.next_teacher(queues, 9.0) == "a"
    assert residency.next_teacher(queues, 11.5) == "b"
    assert residency.victims("b", queues) == ["a"]


def test_a_turn_lasts_as_long_as_the_load_before_it() -> None:
    """However much is overdue, loading takes at most half of the time."""
    residency = Residency({"a": 1, "b": 1}, 1, max_wait_s=1.0)
    residency.reserve("a")
    residency.loaded("a", 100.0, 5.0)
    queues = {"a": Waiting(1, 50.0), "b": Waiting(1, 0.0)}
    assert residency.next_teacher(queues, 104.9) == "a"
    assert residency.next_teacher(queues, 105.1) == "b"


def test_patience_is_what_a_load_takes_or_what_was_set() -> None:
    residency = Residency({"a": 1}, 1, max_wait_s=10.0)
    queues = {"a": Waiting(1, 100.0)}
    assert residency.next_teacher(queues, 100.0) == "a", "nothing is known about its loads yet"
    residency.loaded("a", 90.0, 3.0)
    assert residency.next_teacher(queues, 102.9) is None
    assert residency.next_due_s(queues) == 103.0
    assert residency.next_teacher(queues, 103.1) == "a"
    assert Residency({"a": 1}, 1, max_wait_s=10.0, patience_s=60.0).patience_s("a") == 10.0


def test_those_asked_for_least_are_evicted_first() -> None:
    residency = Residency({"a": 1, "b": 1, "c": 1, "d": 1}, 3, max_wait_s=10.0, pinned=["d"])
    for teacher in "dab":
        residency.reserve(teacher)
    for at in range(10):
        residency.arrived("a", float(at))
    residency.arrived("b", 9.0)
    assert residency.victims("c", {}) == ["b"], "not a, which is in demand, nor d, which is pinned"
    assert residency.victims("c", {"b": Waiting(1, 0.0)}) == ["a"], "whose work waits stays"
    assert residency.victims("c", {}, {"a", "b"}) is None


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    room=st.integers(0, 6),
    pin=st.booleans(),
    patience=st.sampled_from([None, 0.0, 2.0]),
    load_s=st.sampled_from([0.05, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_nobody_starves_and_memory_is_never_exceeded(
    sizes: list[int], room: int, pin: bool, patience: float | None, load_s: float, seed: int
) -> None:
    """Simulated: arrivals at random until a time, everything served one unit after the other."""
    import random

    rng = random.Random(seed)
    names = [f"t{i}" for i in range(len(sizes))]
    by_name = dict(zip(names, sizes))
    memory = max(sizes) + (sizes[0] if pin else 0) + room
    residency = Residency(by_name, memory, pinned=names[:1] if pin else (), max_wait_s=5.0, patience_s=patience)
    unit_s, now = 0.2, 0.0
    arrivals = sorted((rng.uniform(0, 30), rng.choice(names)) for _ in range(120))
    queues: dict[str, list[float]] = {}
    loaded: set[str] = set()
    worst = 0.0
    while arrivals or queues:
        while arrivals and arrivals[0][0] <= now:
            at, name = arrivals.pop(0)
            queues.setdefault(name, []).append(at)
            residency.arrived(name, at)
        waiting = {n: Waiting(len(q), q[0]) for n, q in queues.items()}
        name_or_none = residency.next_teacher(waiting, now)
        if name_or_none is None:
            now += 0.05
            continue
        name = name_or_none
        if name not in loaded:
            victims = residency.victims(name, waiting)
            assert victims is not None
            assert not pin or names[0] not in victims
            for victim in victims:
                residency.evicted(victim)
                loaded.discard(victim)
            residency.reserve(name)
            assert residency.used_bytes <= memory
            now += load_s
            residency.loaded(name, now, load_s)
            loaded.add(name)
        residency.used(name, now)
        worst = max(worst, now - queues[name].pop(0))
        if not queues[name]:
            del queues[name]
        now += unit_s
    # The stated bound, where a unit serves one item: each of the older items may cost a load, a turn and a unit.
    backlog = 120
    assert worst <= 5.0 + backlog * unit_s + backlog * (2 * load_s)
    assert not queues
