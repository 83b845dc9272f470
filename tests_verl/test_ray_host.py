"""The rollout backend as a Ray actor: served to several callers, restarted by Ray, and going on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from hosts import kill_host, stop, wait_until

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.errors import BadInput, CheckpointMismatch, CohortMismatch
from rollout_wal.params import SamplingParams
from rollout_wal.trainers.ray_host import get_host

#: Long enough to be killed in the middle.
SAMPLING = SamplingParams(max_tokens=300, min_tokens=250)
PROMPTS = [[1, 40, 50], [1, 41, 51], [1, 42, 52]]
GROUP = 3


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What the rollouts are when nothing dies and there is no Ray."""
    with RolloutBackend(model, tmp_path_factory.mktemp("plain"), slots=8, segment_bytes=1 << 18) as backend:
        found = list(backend.generate(PROMPTS, SAMPLING, group_size=GROUP, seed=3, cohort="c"))
    return tokens(found)


def tokens(rollouts: list[FinishedRollout]) -> list[list[int]]:
    return [r.tokens.tolist() for r in sorted(rollouts, key=lambda r: r.index)]


def ask(handle: Any) -> Any:
    return handle.generate.remote("c", PROMPTS, SAMPLING, group_size=GROUP, seed=3)


def join_all(handle: Any, cohort: str = "c", **changed: Any) -> list[Any]:
    return [
        handle.join.remote(
            cohort, i, len(PROMPTS) * GROUP, PROMPTS[i // GROUP], SAMPLING, group_size=GROUP, **{"seed": 3, **changed}
        )
        for i in range(len(PROMPTS) * GROUP)
    ]


def test_calls_that_were_waiting_get_their_answer_from_the_restarted_host(
    host: Callable[..., Any], undisturbed: list[list[int]]
) -> None:
    handle = host(workers=2)
    first = ray.get(handle.pid.remote())
    answer = ask(handle)
    wait_until(lambda: ray.get(handle.balance.remote()).begun > 0)
    kill_host(handle)
    found = ray.get(answer, timeout=120)
    assert ray.get(handle.pid.remote()) != first
    assert tokens(found) == undisturbed
    balance = ray.get(handle.balance.remote())
    assert (balance.begun, balance.delivered, balance.in_flight) == (9, 9, 0)


def test_a_worker_of_the_host_may_die(host: Callable[..., Any], undisturbed: list[list[int]]) -> None:
    handle = host(workers=2)
    answer = ask(handle)
    wait_until(lambda: ray.get(handle.balance.remote()).begun > 0)
    for pid in ray.get(handle.worker_pids.remote()).values():
        os.kill(pid, signal.SIGKILL)
    found = ray.get(answer, timeout=120)
    assert tokens(found) == undisturbed
    assert sum(r.interruptions for r in found) > 0


@pytest.mark.parametrize("kill", ["while it gathers", "while it samples", "when all are told"])
def test_callers_that_join_are_one_cohort(host: Callable[..., Any], undisturbed: list[list[int]], kill: str) -> None:
    """Each asks for its own; those who have their answer do not ask again, and the others get theirs all the same."""
    handle = host()
    if kill == "while it gathers":
        waiting = join_all(handle)[:-1]
        assert ray.get(handle.balance.remote()).begun == 0
        kill_host(handle)
        last = join_all(handle)[-1]
        found = ray.get([*waiting, last], timeout=120)
    else:
        waiting = join_all(handle)
        done, others = ray.wait(waiting, num_returns=1 if kill == "while it samples" else 9, timeout=120)
        kill_host(handle)
        found = ray.get([*done, *others], timeout=120)
        found += ray.get(join_all(handle)[4:5], timeout=120)
        found.pop()
    assert tokens(found) == undisturbed
    assert len({r.group for r in found}) == 3
    assert ray.get(handle.cohorts.remote())["c"].size == 9


def test_joining_with_something_else_is_refused_and_nobody_waits_for_ever(host: Callable[..., Any]) -> None:
    handle = host()
    waiting = join_all(handle)[:4]
    with pytest.raises(CohortMismatch, match="another prompt or other parameters"):
        ray.get(handle.join.remote("c", 4, 9, [1, 7], SAMPLING, group_size=3, seed=4), timeout=60)
    for ref in waiting:
        with pytest.raises(CohortMismatch):
            ray.get(ref, timeout=60)
    found = ray.get(join_all(handle), timeout=120)
    with pytest.raises(CohortMismatch):  # the same place in the log, another prompt
        ray.get(handle.join.remote("c", 4, 9, [1, 7], SAMPLING, group_size=3, seed=3), timeout=60)
    ids = [r.id for r in found]
    for _ in range(2):  # the second call finds them gone
        ray.get(handle.consumed.remote(ids[:5], epoch=0, step=1))
    assert ray.get(handle.cohorts.remote())["c"].gone == 5
    with pytest.raises(CheckpointMismatch, match="5 of the 9"):
        ray.get(handle.join.remote("c", 0, 9, PROMPTS[0], SAMPLING, group_size=3, seed=3), timeout=60)
    ray.get(handle.release.remote(ids))
    assert ray.get(handle.balance.remote()).released == 9


def test_a_host_is_found_by_name_and_outlives_nobody_it_should_not(
    host: Callable[..., Any], undisturbed: list[list[int]]
) -> None:
    with pytest.raises(BadInput, match="no rollout host is called 'nobody'"):
        get_host("nobody")
    handle = host(name="by-name")
    assert ray.get(get_host("by-name").pid.remote()) == ray.get(handle.pid.remote())

    @ray.remote(num_cpus=0.1)
    def elsewhere() -> list[FinishedRollout]:
        found: list[FinishedRollout] = ray.get(ask(get_host("by-name")))
        return found

    assert tokens(ray.get(elsewhere.remote(), timeout=120)) == undisturbed
    stop(handle)
    again = host(name="by-name-2")  # the same logs, in good order
    assert tokens(ray.get(ask(again), timeout=120)) == undisturbed


def test_weights_change_once_however_often_it_is_asked(host: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(str(model / "model.safetensors"))
    handle = host()
    assert ray.get(handle.update_weights.remote(dict(weights), label=0)) == 0  # what is in force already
    name = next(n for n in weights if n.endswith("layers.0.mlp.down_proj.weight"))
    changed = {**weights, name: weights[name] + 0.25}
    assert ray.get(handle.update_weights.remote(changed, label=10)) == 1
    kill_host(handle)
    assert ray.get(handle.update_weights.remote(changed, label=10), timeout=120) == 1
    found = ray.get(ask(handle), timeout=120)
    assert {int(v) for r in found for v in r.output.version_T} == {1}
    assert ray.get(handle.labels.remote()) == {1: 10}
