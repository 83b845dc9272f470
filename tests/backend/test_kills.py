"""Workers and the nursery are killed; the rollouts come out as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_wal.backend import EngineSpec, PoisonRule, RolloutBackend
from rollout_wal.engines.base import FinishReason
from rollout_wal.errors import WorkerFailed
from rollout_wal.params import SamplingParams

SAMPLING = SamplingParams(max_tokens=250)


@contextmanager
def killer(
    backend: RolloutBackend, signals: list[int], *, mean_tokens: float = 400, seed: int = 1
) -> Iterator[Counter[int]]:
    """Kills workers that are ready, in a thread, whenever so many tokens have come since the last kill: a schedule in
    seconds would leave a loaded machine no time to get anywhere."""
    rng = random.Random(seed)
    over = threading.Event()
    killed: Counter[int] = Counter()

    def run() -> None:
        due = 0.0
        while not over.wait(0.005):
            if backend.stats.tokens >= due and (ready := sorted(backend.worker_steps())):
                due = backend.stats.tokens + rng.expovariate(1 / mean_tokens)
                number = rng.choice(signals)
                backend.kill_worker(rng.choice(ready), number)
                killed[number] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_sigkill_and_sigterm_leave_no_trace_in_the_tokens(
    backend: Callable[..., RolloutBackend], prompts: Any, reference: Any
) -> None:
    stop = SamplingParams(max_tokens=250, stop=("42", "= 1"))
    expected = {
        "plain": reference(prompts, SAMPLING, group_size=6, seed=1),
        "stop": reference(prompts, SAMPLING, group_size=6, seed=2),
    }
    # On a slow machine the killer may be quicker than a worker starts: that is not what poison means.
    with backend(poison=PoisonRule(deaths=1000)) as b:
        uninterrupted = {r.index: r for r in b.generate(prompts, stop, group_size=6, seed=2, cohort="stop-0")}
        with killer(b, [signal.SIGKILL, signal.SIGTERM]):
            plain = list(b.generate(prompts, SAMPLING, group_size=6, seed=1))
            stopped = list(b.generate(prompts, stop, group_size=6, seed=2, cohort="stop-1"))
        assert b.stats.deaths >= 2
        assert b.stats.resumed > 0
        assert b.balance().holds
        assert b.balance().in_flight == 0
    assert len(plain) == len(stopped) == 48
    assert sum(r.interruptions for r in plain + stopped) > 0
    assert all(r.censored is None for r in plain + stopped)
    for r in plain:
        assert r.tokens.tolist() == expected["plain"][r.index]
        assert r.output.logprob.valid_T.all()
    assert any(r.finish_reason is FinishReason.STOP_STRING for r in stopped)
    for r in stopped:
        twin = uninterrupted[r.index]
        assert r.tokens.tolist() == twin.tokens.tolist() == expected["stop"][r.index][: len(r.tokens)]
        assert r.finish_reason is twin.finish_reason
        np.testing.assert_allclose(r.output.logprob.value_T, twin.output.logprob.value_T, atol=1e-4)


def test_the_nursery_is_replaced_and_outlives_a_notice(
    backend: Callable[..., RolloutBackend], prompts: Any, reference: Any, until: Callable[..., None]
) -> None:
    with backend() as b:
        nursery = b._running().fleet.nursery
        pids = b.worker_pids()
        iterator = b.generate(prompts, SAMPLING, group_size=6, seed=1)
        os.kill(nursery.pid, signal.SIGTERM)  # as a preemption notice to a whole control group does
        for name in ("0", "1"):
            b.kill_worker(name, signal.SIGTERM)
        until(lambda: b.stats.deaths == 2 and len(b.worker_steps()) == 2)
        first = nursery.pid
        os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        survivors = b.worker_pids()
        assert set(survivors.values()).isdisjoint(pids.values())
        b.kill_worker("0")
        rollouts = list(iterator)
        until(lambda: len(b.worker_steps()) == 2)
        assert nursery.pid != first
        assert b.worker_pids()["1"] == survivors["1"]  # its parent's death did not reach it
    expected = reference(prompts, SAMPLING, group_size=6, seed=1)
    assert {r.index: r.tokens.tolist() for r in rollouts} == dict(enumerate(expected))


def test_fresh_noise_keeps_what_was_durable_and_changes_the_rest(
    backend: Callable[..., RolloutBackend], prompts: Any, reference: Any, witness: Any, until: Callable[..., None]
) -> None:
    with backend(witness=str(witness.path), workers=1) as b:
        iterator = b.generate(prompts, SamplingParams(max_tokens=600, ignore_eos=True), seed=9, noise="attempt")
        until(lambda: b.stats.tokens > 400)
        b.kill_worker("0")
        rollouts = {r.id: r for r in iterator}
        positioned = {
            r.index: r.tokens for r in b.generate(prompts, SamplingParams(max_tokens=600, ignore_eos=True), seed=9)
        }
    shown = witness.shown()
    for r in rollouts.values():
        assert r.interruptions == 1
        ((start, token, logprob),) = shown[r.id, 1]
        assert start == 0
        assert len(token) > 20
        np.testing.assert_array_equal(r.tokens[: len(token)], token.astype(np.int32))
        np.testing.assert_array_equal(r.output.logprob.value_T[: len(token)], logprob)
        # Each attempt has noise of its own, the first one too; so the two ways of drawing differ everywhere.
        assert not np.array_equal(r.tokens[len(token) :], positioned[r.index][len(token) :])


FAULTY = '''
import os, signal, time
from pathlib import Path
from rollout_wal.engines.hf import HFEngine

class Faulty(HFEngine):
    """Dies of one prompt once it has sampled five tokens of it; or of its start; as a defect of a kernel would."""

    deadly = None

    @classmethod
    def build(cls, folder, *, deadly, policy_version=0, fail="", max_batch=16):
        if fail == "told":
            raise RuntimeError("no such device")
        if fail == "silent":
            os.kill(os.getpid(), signal.SIGKILL)
        engine = cls.from_folder(folder, max_batch=max_batch, policy_version=policy_version)
        engine.deadly = deadly
        engine.slot = None
        engine.count = 0
        return engine

    def add(self, request):
        super().add(request)
        if request.prompt[0] == self.deadly:
            self.slot, self.count = request.slot, len(request.prefix)

    def step(self):
        if self.slot is not None and self.count >= 5:
            time.sleep(0.5)  # the log's thread is done with the fifth by then
            os.kill(os.getpid(), signal.SIGKILL)
        out = super().step()
        if self.slot is not None and self.slot in out.slot_N.tolist():
            self.count += 1
        return out
'''


@pytest.fixture
def faulty(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineSpec]:
    """An engine that lives beside the caller's script, not in an installed package."""
    (tmp_path / "faulty_engine.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**options: Any) -> EngineSpec:
        return EngineSpec(str(model), "faulty_engine:Faulty.build", {"deadly": 7, **options})

    return make


def test_a_rollout_that_kills_its_worker_is_given_up(
    backend: Callable[..., RolloutBackend], faulty: Callable[..., EngineSpec], prompts: Any, reference: Any
) -> None:
    with backend(engine=faulty(), workers=1, poison=PoisonRule(deaths=3, tokens=4)) as b:
        rollouts = list(b.generate([*prompts, [7, 7, 7]], SAMPLING, seed=4))
        balance = b.balance()
    (poisoned,) = [r for r in rollouts if r.censored]
    assert poisoned.censored == "poison"
    assert poisoned.index == 8
    assert len(poisoned.tokens) == 5
    expected = reference([*prompts, [7, 7, 7]], SAMPLING, seed=4)
    assert poisoned.tokens.tolist() == expected[8][:5]
    assert {r.index: r.tokens.tolist() for r in rollouts if r is not poisoned} == dict(enumerate(expected[:8]))
    assert balance.holds
    assert dict(balance.censored) == {"poison": 1}


@pytest.mark.parametrize(("fail", "words"), [("told", "RuntimeError: no such device"), ("silent", "died 20 times")])
def test_a_worker_that_cannot_start_is_told(
    backend: Callable[..., RolloutBackend], faulty: Callable[..., EngineSpec], fail: str, words: str
) -> None:
    with pytest.raises(WorkerFailed, match=words):
        backend(engine=faulty(fail=fail), workers=1).start()
