"""The rollout backend as a Ray actor: served to several callers, restarted by Ray, and going on."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from hosts import kill_host, stop, wait_until

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.errors import BadInput, CheckpointMismatch, CohortMismatch, RolloutWalError
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ray_host import get_host, start_host
from rollout_wal.trainers.ray_host.host import shared_out

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


def ask(handle: Any, cohort: str) -> Any:
    return handle.generate.remote(cohort, PROMPTS, SAMPLING, group_size=GROUP, seed=3)


def join(handle: Any, cohort: str, index: int, **changed: Any) -> Any:
    """One of those who want a cohort, who knows its own prompt only."""
    prompt = changed.pop("prompt", PROMPTS[index // GROUP])
    size = len(PROMPTS) * GROUP
    return handle.join.remote(cohort, index, size, prompt, SAMPLING, group_size=GROUP, **{"seed": 3, **changed})


def begun(handle: Any, cohort: str) -> bool:
    return cohort in ray.get(handle.cohorts.remote())


@pytest.fixture(scope="module")
def shared(make_host: Callable[..., Any]) -> Any:
    """One host for those who have a cohort of their own: Ray starts it once, and again after each kill."""
    return make_host("shared", workers=2)


def test_calls_that_were_waiting_get_their_answer_from_the_restarted_host(
    shared: Any, undisturbed: list[list[int]]
) -> None:
    first = ray.get(shared.pid.remote())
    answer = ask(shared, "waiting")
    wait_until(lambda: begun(shared, "waiting"))
    kill_host(shared)
    found = ray.get(answer, timeout=120)
    assert ray.get(shared.pid.remote()) != first
    assert tokens(found) == undisturbed
    count = ray.get(shared.cohorts.remote())["waiting"]
    assert (count.size, count.gone) == (9, 0)
    assert ray.get(shared.balance.remote()).holds


def test_the_host_outlives_its_first_handle(model: Path, cluster: None, tmp_path: Path) -> None:
    """Ray counts the handle of the call that started an actor, and none that was found by its name."""
    first = start_host(model, tmp_path / "wal", name="kept", slots=8, num_cpus=0.5)
    pid = ray.get(first.pid.remote())
    again = start_host(model, tmp_path / "wal", name="kept", slots=8, num_cpus=0.5)
    del first
    gc.collect()
    time.sleep(1.0)  # Ray tells the actor, which ends on its own
    assert ray.get(again.pid.remote()) == pid
    stop(again)


def test_a_worker_of_the_host_may_die(shared: Any, undisturbed: list[list[int]]) -> None:
    answer = ask(shared, "workers")
    wait_until(lambda: begun(shared, "workers"))
    for pid in ray.get(shared.worker_pids.remote()).values():
        os.kill(pid, signal.SIGKILL)
    found = ray.get(answer, timeout=120)
    assert tokens(found) == undisturbed
    assert sum(r.interruptions for r in found) > 0


@pytest.mark.parametrize("kill", ["while it gathers", "while it samples", "when all are told"])
def test_callers_that_join_are_one_cohort(shared: Any, undisturbed: list[list[int]], kill: str) -> None:
    """Each asks for its own; those who have their answer do not ask again, and the others get theirs all the same."""
    size = len(PROMPTS) * GROUP
    if kill == "while it gathers":
        waiting = [join(shared, kill, i) for i in range(size - 1)]
        assert not begun(shared, kill)
        kill_host(shared)
        found = ray.get([*waiting, join(shared, kill, size - 1)], timeout=120)
    else:
        waiting = [join(shared, kill, i) for i in range(size)]
        told = 1 if kill == "while it samples" else size
        done, others = ray.wait(waiting, num_returns=told, timeout=120)
        kill_host(shared)
        found = ray.get([*done, *others], timeout=120)
        # One whose answer got lost asks alone, after all others have theirs.
        assert ray.get(join(shared, kill, 4), timeout=120).tokens.tolist() == undisturbed[4]
    assert tokens(found) == undisturbed
    assert len({r.group for r in found}) == 3
    assert ray.get(shared.cohorts.remote())[kill].size == size


def test_joining_with_something_else_is_refused_and_nobody_waits_for_ever(shared: Any) -> None:
    waiting = [join(shared, "other", i) for i in range(4)]
    # The calls of one caller may overtake one another, so it is asked until they wait.
    time.sleep(0.5)
    with pytest.raises(CohortMismatch, match="another prompt or other parameters"):
        ray.get(join(shared, "other", 4, prompt=[1, 7], seed=4), timeout=60)
    for ref in waiting:
        with pytest.raises(CohortMismatch):
            ray.get(ref, timeout=60)
    with pytest.raises(CohortMismatch):  # one of a group has another prompt, which shows when all are named
        ray.get([join(shared, "other", i, **({"prompt": [1, 7]} if i == 4 else {})) for i in range(9)], timeout=60)
    found = ray.get([join(shared, "other", i) for i in range(9)], timeout=120)
    with pytest.raises(CohortMismatch):  # the same place in the log, another prompt
        ray.get(join(shared, "other", 4, prompt=[1, 7]), timeout=60)
    ids = [r.id for r in found]
    for _ in range(2):  # the second call finds them gone
        ray.get(shared.consumed.remote(ids[:5], epoch=0, step=1))
    assert ray.get(shared.cohorts.remote())["other"].gone == 5
    with pytest.raises(CheckpointMismatch, match="5 of the 9"):
        ray.get(join(shared, "other", 0), timeout=60)
    with pytest.raises(BadInput, match="no member 0, or it was consumed"):
        ray.get(shared.rollout.remote("other", 0), timeout=60)
    ray.get(shared.release.remote(ids))
    assert ray.get(shared.cohorts.remote())["other"].gone == 9


def test_a_host_is_found_by_name(shared: Any, undisturbed: list[list[int]]) -> None:
    with pytest.raises(BadInput, match="no rollout host is called 'nobody'"):
        get_host("nobody")
    assert ray.get(get_host("shared").pid.remote()) == ray.get(shared.pid.remote())

    @ray.remote(num_cpus=0.1)
    def elsewhere() -> list[FinishedRollout]:
        found: list[FinishedRollout] = ray.get(ask(get_host("shared"), "elsewhere"))
        return found

    assert tokens(ray.get(elsewhere.remote(), timeout=120)) == undisturbed


def test_weights_change_once_however_often_it_is_asked(
    make_host: Callable[..., Any], shared: Any, model: Path, undisturbed: list[list[int]]
) -> None:
    """The last to use the logs of the shared host: another host goes on with them, where the first has ended."""
    from safetensors.torch import load_file

    stop(shared)
    handle = make_host("successor")
    assert tokens(ray.get(ask(handle, "elsewhere"), timeout=120)) == undisturbed
    weights = load_file(str(model / "model.safetensors"))
    assert ray.get(handle.update_weights.remote(dict(weights), label=0)) == 0  # what is in force already
    name = next(n for n in weights if n.endswith("layers.0.mlp.down_proj.weight"))
    changed = {**weights, name: weights[name] + 0.25}
    assert ray.get(handle.update_weights.remote(changed, label=10)) == 1
    kill_host(handle)
    assert ray.get(handle.update_weights.remote(changed, label=10), timeout=120) == 1
    found = ray.get(ask(handle, "new"), timeout=120)
    assert {int(v) for r in found for v in r.output.version_T} == {1}
    assert ray.get(handle.labels.remote()) == {0: 0, 1: 10}  # the first was given to the host that died


def test_a_host_whose_backend_cannot_go_on_makes_room(cluster: None, tmp_path: Path) -> None:
    """Its worker's successors find no model: the backend stops. Ray's next actor fails with the reason, and once the
    model is there again, whoever starts a host gets one that goes on."""
    model = make_tiny_model(tmp_path / "model", mean_length=40.0)

    def start() -> Any:
        return start_host(model, tmp_path / "wal", name="stuck", slots=8, segment_bytes=1 << 18, num_cpus=0.5)

    handle = start()
    ray.get(ask(handle, "before"))
    model.rename(tmp_path / "away")
    (pid,) = ray.get(handle.worker_pids.remote()).values()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((RolloutWalError, ray.exceptions.RayActorError)):
        ray.get(ask(handle, "after"), timeout=120)
    reason = ""

    def is_dead() -> bool:
        nonlocal reason
        try:
            ray.get(handle.policy_version.remote(), timeout=120)
        except ray.exceptions.RayActorError as error:
            reason = str(error)
        except RolloutWalError:
            return False  # the old actor tells what its backend said
        return "config.json" in reason

    wait_until(is_dead, 120)
    (tmp_path / "away").rename(model)
    again = start()
    assert len(ray.get(ask(again, "after"), timeout=120)) == len(PROMPTS) * GROUP
    stop(again)


def test_what_ray_sets_aside_is_shared_out() -> None:
    assert shared_out(["0", "1", "4", "5"], 2) == ["0,1", "4,5"]
    assert shared_out([2, 3], 2) == ["2", "3"]
    assert shared_out(["0", "1"], 1) is None
    assert shared_out(["3"], 2) is None
    assert shared_out([], 8) is None
    with pytest.raises(BadInput, match="num_gpus=3 for 2 workers"):
        shared_out(["0", "1", "2"], 2)
