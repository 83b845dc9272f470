"""Every check of the suite fails on the defect that it is there for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout_wal.audit.backends import Finished
from rollout_wal.backend import EngineSpec
from rollout_wal.engines.hf import HFEngine
from rollout_wal.params import SamplingParams
from rollout_wal.testing import defects
from rollout_wal.testing.conformance import backend_checks, engine_checks, live_checks
from rollout_wal.testing.conformance.live_tests import LiveConformance
from rollout_wal.testing.conformance.settings import Conformance, ConformanceError
from rollout_wal.testing.tiny_models import make_tiny_model

pytest_plugins = ["rollout_wal.testing.conformance"]

SETTINGS = Conformance(max_tokens=30, splits=3, timeout_s=60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=30.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), mean_length=30.0, seed=1)


def resumed(name: str) -> engine_checks.Check:
    def check(engine: Any, settings: Conformance) -> None:
        engine_checks.resume_equals_uninterrupted(engine, settings, engine_checks.sampling_named(name, settings))

    return check


@pytest.mark.parametrize(
    ("defect", "check", "message"),
    [
        (defects.ReusedSeed, resumed("plain"), "differ from the uninterrupted run"),
        (defects.ReusedSeed, engine_checks.resumed_in_company, "differ from the uninterrupted run"),
        (defects.FreshNoiseOnResume, resumed("filters"), "differ from the uninterrupted run"),
        (defects.LosesLastToken, resumed("greedy"), "differ from the uninterrupted run"),
        (defects.PrefixAsPrompt, resumed("presence"), "differ from the uninterrupted run"),
        (defects.PrefixAsPrompt, engine_checks.minimum_holds_over_resumes, "differ from the uninterrupted run"),
        (defects.PrefixAsPrompt, engine_checks.finish_predicate, "max_tokens=6"),
        (defects.AcceptsAnything, engine_checks.finish_predicate, "max_tokens|stop token|was accepted"),
        (defects.ShiftedLogprobs, engine_checks.logprobs_are_the_models, "off by"),
        (defects.TemperedLogprobs, engine_checks.logprobs_are_the_models, "none was computed"),
        (defects.RepeatsRows, engine_checks.slots_are_the_callers, "two rows of one slot"),
        (defects.DeafToAbort, engine_checks.abort_frees_and_spares, "abort left"),
        (defects.OneKey, engine_checks.noise_is_the_keys, "gave the same"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_defective_engine_is_found(
    defect: type[HFEngine], check: engine_checks.Check, message: str, model: Path
) -> None:
    engine = defect.from_folder(model, max_batch=64)
    with pytest.raises(ConformanceError, match=message):
        check(engine, SETTINGS)


def test_old_kv_after_an_update_is_found(model: Path, other: Path) -> None:
    engine = defects.OldKv.from_folder(model, max_batch=64)
    with pytest.raises(ConformanceError, match=r"during a weights update: .* differ"):
        engine_checks.weights_update(engine, replace(SETTINGS, other_weights=other), model)


def test_bad_prompts_that_are_accepted_are_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_wal.engines.hf.engine.check_request", lambda *_: None)
    with pytest.raises(ConformanceError, match="was accepted"):
        engine_checks.bad_prompts_are_refused(HFEngine.from_folder(model), SETTINGS)


def test_a_reused_seed_behind_the_backend_is_found(model: Path, tmp_path: Path) -> None:
    spec = EngineSpec(str(model), "rollout_wal.testing.defects:ReusedSeed.from_folder", {"max_batch": 64})
    with backend_checks.KilledBackend(spec, tmp_path, SETTINGS) as backend:
        run = backend.calm(SamplingParams(max_tokens=30))
        backend_checks.each_once(run, 9)
        with pytest.raises(ConformanceError, match="differ from the uninterrupted run"):
            backend_checks.survives(backend, (("appended", 7),))
        # From here on what a correct run looks like is known; each of these is not it.
        for message, bad in spoilt(run):
            with pytest.raises(ConformanceError, match=message):
                conforms(bad, run)
        conforms(run, run)
        with pytest.raises(ConformanceError, match="nothing was shown"):
            backend_checks.deaths_took_place(run, (("appended", 7),))


def conforms(run: backend_checks.Run, calm: backend_checks.Run) -> None:
    backend_checks.each_once(run, 9)
    backend_checks.nothing_early(run)
    backend_checks.as_uninterrupted(run, calm, SETTINGS)


def spoilt(run: backend_checks.Run) -> Iterator[tuple[str, backend_checks.Run]]:
    """(what the suite must say, a run with that defect)"""
    first, *rest = run.rollouts
    at = first.output

    def with_first(*firsts: Any) -> backend_checks.Run:
        return replace(run, rollouts=(*firsts, *rest))

    yield "delivered more than once", with_first(first, first)
    yield "never delivered", with_first()
    yield "censored as oom", with_first(replace(first, censored="oom"))
    yield "differ from the uninterrupted run", with_first(replace(first, output=at[: len(at) - 1]))
    order = np.roll(np.arange(len(at)), 1)
    yield "differ from the uninterrupted run", with_first(replace(first, output=replace(at, token_T=at.token_T[order])))
    yield "policy versions", with_first(replace(first, output=replace(at, version_T=at.version_T + 1)))
    valid = at.logprob.valid_T.copy()
    valid[-1] = False
    yield (
        "lacks its logprob",
        with_first(replace(first, output=replace(at, logprob=replace(at.logprob, valid_T=valid)))),
    )
    worse = replace(at.logprob, value_T=at.logprob.value_T - np.float32(0.01))
    yield "off by", with_first(replace(first, output=replace(at, logprob=worse)))
    yield "before all of them was durable", replace(run, undurable=(first.id,))


def test_delivery_before_durability_is_found(model: Path, tmp_path: Path) -> None:
    spec = EngineSpec(str(model), "rollout_wal.testing.defects:ShowsEarly.from_folder", {"max_batch": 64})
    with backend_checks.KilledBackend(spec, tmp_path, SETTINGS) as backend:
        run = backend.run(SamplingParams(max_tokens=30))
        with pytest.raises(ConformanceError, match="before all of them was durable"):
            backend_checks.nothing_early(run)


class Live:
    """A backend of one thread over a language model of one line; correct, or with one defect."""

    def __init__(self, defect: str = "") -> None:
        self.defect = defect
        self._in: list[list[Any]] = []
        self._out: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, prompt_tokens: Sequence[int], sampling: SamplingParams, seed: int) -> int:
        with self._mutex:
            self._in.append([len(self._in), seed, list(prompt_tokens), [], 0, False, 0])
            return 0 if self.defect == "same id" else len(self._in) - 1

    def interrupt(self, kind: str) -> None:
        with self._mutex:
            for job in self._in:
                _, _, _, tokens, _, done, _ = job
                if not done:
                    job[4] += 1
                    if self.defect == "lost token":
                        del tokens[-1:]
                        job[6] += 1
                    elif self.defect == "reused seed":
                        job[6] = len(tokens)
                elif self.defect == "duplicate" and not job[6]:
                    job[6] = 1
                    self._deliver(job)
            if self.defect == "lost rollout":
                self._in[-1][5] = True

    def collect(self) -> Iterable[Finished]:
        while True:
            try:
                yield self._out.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        self._closing = True
        self._thread.join()

    def _deliver(self, job: list[Any]) -> None:
        tokens = list(job[3])
        logprobs = [-0.5] * (len(tokens) - (self.defect == "logprob missing"))
        self._out.put(Finished(job[0], tokens, logprobs, "" if self.defect == "no reason" else "eos", job[4]))

    def _serve(self) -> None:
        while not self._closing:
            time.sleep(0.001)
            with self._mutex:
                for job in self._in:
                    number, seed, prompt, tokens, _, done, shift = job
                    if done:
                        continue
                    rng = np.random.default_rng([seed, *prompt, len(tokens) + 1 - shift * (self.defect != "duplicate")])
                    tokens.append(int(rng.integers(100)))
                    if len(tokens) == 5 + 3 * (number % 8):
                        job[5] = True
                        self._deliver(job)


LIVE = Conformance(max_tokens=40, timeout_s=20.0)


@pytest.fixture(scope="session")
def conformance_settings() -> Conformance:
    return LIVE


@pytest.fixture(scope="session")
def conformance_live_backend() -> Callable[[], live_checks.LiveBackend]:
    return Live


class TestLive(LiveConformance): ...


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("same id", "twice"),
        ("duplicate", "delivered more than once"),
        ("lost rollout", "did not come within"),
        ("lost token", "differ from the uninterrupted run"),
        ("reused seed", "differ from the uninterrupted run"),
        ("logprob missing", "logprobs"),
        ("no reason", "no finish reason"),
    ],
)
def test_a_defective_live_backend_is_found(defect: str, message: str) -> None:
    calm = live_checks.run_live(Live, LIVE)
    deaths = live_checks.LIVE_DEATHS["after the first delivery"]
    with pytest.raises(ConformanceError, match=message):
        live_checks.live_survives(lambda: Live(defect), replace(LIVE, timeout_s=3.0), deaths, calm, keyed=True)
