"""Which teachers are loaded, and whose turn it is."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.errors import BadConfiguration
from scoring.residency import Residency, Waiting
from scoring.simulated import simulate


def in_memory(residency: Residency, *teachers: str, load_s: float = 0.0) -> None:
    for teacher in teachers:
        residency.reserve(teacher)
        residency.loaded(teacher, load_s)
        residency.worked(teacher, load_s)


def test_teachers_that_never_fit_are_refused() -> None:
    with pytest.raises(BadConfiguration, match="does not fit"):
        Residency({"a": 5, "b": 6}, 10, pinned=["a"])
    with pytest.raises(BadConfiguration):
        Residency({"a": 5}, 10, pinned=["nobody"])
    Residency({"a": 5, "b": 5}, 10, pinned=["a"])


def test_nobody_with_work_is_evicted_until_another_could_be_late() -> None:
    residency = Residency({"a": 1, "b": 1}, 1, max_wait_s=10.0)
    in_memory(residency, "a", load_s=2.0)
    queues = {"a": Waiting(5, 8.0), "b": Waiting(500, 1.0)}
    # b's load is not known: as long as a's. Units of 2 s: under way then, under way when it is loaded, and its own.
    early = residency.plan(queues, 2.9)
    assert (early.load, early.work, early.again_s) == (None, "a", 3.0)
    late = residency.plan(queues, 3.0)
    assert (late.load, late.evict, late.work) == ("b", ("a",), None)
    blocked = residency.plan(queues, 3.0, busy="a")
    assert (blocked.load, blocked.work, blocked.again_s) == (None, None, math.inf), "its memory is in use"


def test_loads_that_are_due_together_begin_one_load_earlier_each() -> None:
    residency = Residency({"a": 1, "b": 1, "c": 1, "d": 1}, 1, max_wait_s=10.0, patience_s=10.0)
    in_memory(residency, "a")
    residency.reserve("b")
    residency.loaded("b", 1.0)
    residency.evicted("b")
    queues = {"b": Waiting(1, 0.0), "c": Waiting(1, 0.1), "d": Waiting(1, 0.2)}
    assert residency.plan(queues, 0.5).again_s == pytest.approx(7.2)
    assert residency.plan(queues, 7.2).load == "b"


def test_memory_that_is_free_is_used_at_once() -> None:
    residency = Residency({"a": 1, "b": 1}, 2, max_wait_s=10.0, patience_s=10.0)
    assert residency.plan({"a": Waiting(1, 0.0)}, 0.0).load == "a"


def test_a_turn_lasts_as_long_as_the_load_before_it() -> None:
    """However much is overdue, loading takes at most half of the time."""
    residency = Residency({"a": 1, "b": 1}, 1, max_wait_s=1.0)
    residency.reserve("a")
    residency.loaded("a", 5.0)
    queues = {"a": Waiting(1, 50.0), "b": Waiting(1, 0.0)}
    residency.worked("a", 4.9)
    plan = residency.plan(queues, 104.9)
    assert (plan.load, plan.work) == (None, "a")
    residency.worked("a", 0.2)
    assert residency.plan(queues, 105.1).load == "b"


def test_patience_is_what_a_load_takes_or_what_was_set() -> None:
    residency = Residency({"a": 1, "b": 1}, 1, max_wait_s=10.0)
    in_memory(residency, "b")
    queues = {"a": Waiting(1, 100.0)}
    assert residency.plan(queues, 100.0).load == "a", "nothing is known about its loads yet"
    residency.loaded("a", 3.0)
    residency.evicted("a")
    assert residency.plan(queues, 102.9).load is None
    assert residency.plan(queues, 102.9).again_s == 103.0
    assert residency.plan(queues, 103.1).load == "a"
    assert Residency({"a": 1}, 1, max_wait_s=10.0, patience_s=60.0).patience_s("a") == 10.0


def test_those_asked_for_least_are_evicted_and_work_before_that() -> None:
    residency = Residency({"a": 1, "b": 1, "c": 1, "d": 1, "e": 2}, 3, max_wait_s=10.0, patience_s=0.0, pinned=["d"])
    in_memory(residency, "d", "a", "b")
    for at in range(10):
        residency.arrived("a", float(at))
    residency.arrived("b", 9.0)
    assert residency.victims("c") == ["b"], "not a, which is in demand, nor d, which is pinned"
    assert residency.victims("c", {"a", "b"}) is None
    assert residency.victims("e") == ["b", "a"]
    plan = residency.plan({"a": Waiting(1, 8.0), "b": Waiting(1, 9.0), "c": Waiting(1, 9.0)}, 9.0)
    assert (plan.load, plan.work) == (None, "b"), "so that it leaves nothing behind"
    # One large one that has to go anyway makes room enough: the small one before it stays.
    residency = Residency({"small": 1, "large": 3, "new": 3}, 4, max_wait_s=10.0)
    in_memory(residency, "small", "large")
    assert residency.victims("new") == ["large"]


def poisson(seconds: float, per_s: float, teachers: int, seed: int) -> list[tuple[float, str]]:
    rng = random.Random(seed)
    times = itertools.takewhile(lambda t: t < seconds, itertools.accumulate(iter(lambda: rng.expovariate(per_s), None)))
    shares = [1 / (i + 1) for i in range(teachers)]
    return [(t, f"t{rng.choices(range(teachers), shares)[0]}") for t in times]


@pytest.mark.parametrize("seed", range(5))
def test_items_begin_in_time_and_wait_for_as_few_loads_as_that_takes(seed: int) -> None:
    """Ten teachers, memory for three, loads that take between 0.1 and 0.2 s. See `benchmarks.scoring` for a bound."""
    rng = random.Random(seed)
    residency = Residency({f"t{i}": 1 for i in range(10)}, 3, max_wait_s=10.0, patience_s=10.0)
    found = simulate(
        residency, poisson(60.0, 40.0, 10, seed), lambda _: rng.uniform(0.1, 0.2), lambda n: 0.01 + n / 1e3
    )
    # Two of three places are kept by the two most in demand. The eight others take turns in the third: at most one
    # load each in ten seconds, for they wait for nothing else.
    assert max(found.waited_s) <= 10.0 + 2 * 0.2
    assert len(found.loads) <= 3 + 8 * 7
    assert len(found.loads) <= 50
    assert found.loads.count("t0") <= 2


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    room=st.integers(0, 6),
    patience=st.sampled_from([None, 0.0, 2.0]),
    load_s=st.sampled_from([0.05, 1.0]),
    unit_items=st.sampled_from([1, 5, 1000]),
    seed=st.integers(0, 10_000),
)
def test_nobody_starves_and_memory_is_never_exceeded(
    sizes: list[int], room: int, patience: float | None, load_s: float, unit_items: int, seed: int
) -> None:
    """More arrives than can be served, until a time; then all of it is."""
    rng = random.Random(seed)
    names = [f"t{i}" for i in range(len(sizes))]
    arrivals = sorted((rng.uniform(0, 30), rng.choice(names)) for _ in range(120))
    residency = Residency(dict(zip(names, sizes)), max(sizes) + room, max_wait_s=5.0, patience_s=patience)
    found = simulate(residency, arrivals, lambda _: load_s, lambda _: 0.2, unit_items=unit_items)
    assert len(found.waited_s) == len(arrivals)
    # The stated bound, where a unit serves one item: each of the older items may cost a load, a turn and a unit.
    assert max(found.waited_s) <= 5.0 + 120 * (0.2 + 2 * load_s + 0.2)
