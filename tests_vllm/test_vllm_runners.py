"""vLLM as it runs on a GPU: asynchronous scheduling, model runner V2 (its kernels interpreted), routes of experts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput

from rollout_wal.engines.common.logged import Logged, read_logged
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model

HERE = Path(__file__).parent
RNG = np.random.default_rng(13)
PROMPTS = [RNG.integers(4, 380, size=int(n)).tolist() for n in (5, 100, 40)]
SAMPLING: list[dict[str, Any]] = [
    {"max_tokens": 60, "ignore_eos": True},
    {"max_tokens": 50, "temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "min_tokens": 20},
    {"max_tokens": 60, "ignore_eos": True, "min_p": 0.05, "repetition_penalty": 1.2},
]
KEY = 70


def requests(name: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"rollout": f"{name}{i}", "key": KEY + i, "prompt": p, "sampling": s, **more}
        for i, (p, s) in enumerate(zip(PROMPTS, SAMPLING, strict=True))
    ]


@pytest.fixture
def host(model: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process of host.py."""
    running: list[subprocess.Popen[str]] = []

    def start(rounds: list[Any], **options: Any) -> subprocess.Popen[str]:
        job = {"model": str(model), "log": str(tmp_path / "wal"), "asynchronous": True, "routes": False}
        job |= {"version_at": 0, "named": True, **options}
        path = tmp_path / f"job-{len(running)}.json"
        path.write_text(json.dumps({**job, "rounds": rounds}))
        with (tmp_path / "host.log").open("ab") as errors:
            running.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "host.py"), str(path)], stdout=subprocess.PIPE, stderr=errors, text=True
                )
            )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    print((tmp_path / "host.log").read_text()[-6000:])


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert process.stdout is not None
    got = [json.loads(line.split(" ", 1)[1]) for line in process.stdout if line.startswith("got")]
    assert process.wait(120) == 0
    return got


def logged_as(log: Path, tokens: list[int], attempts: int) -> Logged:
    """The one rollout of so many attempts with these tokens."""
    (found,) = [r for r in read_logged(log).values() if r.token_T.tolist() == tokens and r.attempts == attempts]
    return found


@pytest.fixture(scope="module")
def expected(engine: Any, tools: SimpleNamespace) -> list[list[Any]]:
    """(token, logprob, sampling logprob, finish) of model runner V1, scheduled synchronously."""
    rows = tools.drive(
        engine,
        [
            tools.request_of(i, p, SamplingParams(**s), noise_key=KEY + i)
            for i, (p, s) in enumerate(zip(PROMPTS, SAMPLING, strict=True))
        ],
    )
    return [rows[i] for i in range(len(PROMPTS))]


def test_a_step_in_flight_is_of_the_version_that_it_was_scheduled_under(host: Any, tmp_path: Path) -> None:
    (got,) = results(host([requests("r")], runner="v1", version_at=24))  # all three run
    assert len(got) == len(PROMPTS)
    for mine in got.values():
        versions = logged_as(tmp_path / "wal" / "0", mine["tokens"], attempts=1).version_T.tolist()
        assert versions == [0] * mine["old"] + [5] * (len(versions) - mine["old"])
        assert 0 < mine["old"] < len(versions)


def test_of_nameless_weights_only_the_step_in_flight_is_logged(host: Any, tmp_path: Path) -> None:
    cut, whole = results(host([requests("r"), requests("r")], runner="v1", version_at=24, named=False))
    for key, mine in cut.items():
        assert mine["finish"] == "error"
        assert len(mine["tokens"]) == mine["old"] > 0
        assert whole[key]["tokens"][: mine["old"]] == mine["tokens"]
        versions = logged_as(tmp_path / "wal" / "0", whole[key]["tokens"], attempts=2).version_T.tolist()
        assert versions == [0] * mine["old"] + [5] * (len(versions) - mine["old"])


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_scheduled_asynchronously_all_is_the_same(
    host: Any, expected: list[list[Any]], tmp_path: Path, runner: str
) -> None:
    """A draw is found by its position: at this one's outputs, the next step has been drawn already."""
    cut, whole = results(host([requests("r", upto=15), requests("r")], runner=runner))
    for index, rows in enumerate(expected):
        tokens = [r[0] for r in rows]
        first, second = cut[f"{index}"], whole[f"{index}"]
        assert first["tokens"] == tokens[: len(first["tokens"])]
        assert len(first["tokens"]) >= min(15, len(tokens))
        assert second["tokens"] == tokens
        np.testing.assert_allclose(second["logprobs"], [r[1] for r in rows], atol=1e-4)
        found = logged_as(tmp_path / "wal" / "0", tokens, attempts=2)
        assert found.finish == rows[-1][3]
        assert found.sampling_logprob.valid_T.all()
        np.testing.assert_allclose(found.logprob.value_T, [r[1] for r in rows], atol=1e-4)
        np.testing.assert_allclose(found.sampling_logprob.value_T, [r[2] for r in rows], atol=1e-4)


def test_routes_of_experts_are_logged_and_survive_a_kill(host: Any, tmp_path: Path) -> None:
    moe = make_tiny_model(tmp_path / "moe", "moe", mean_length=60.0, max_context=512, head_dim=32)
    options = {"runner": "v2", "routes": True, "model": str(moe)}
    killed = host([requests("r")], **options)
    for line in killed.stdout:
        if line.startswith("tokens") and int(line.split()[1]) >= 60:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    log = tmp_path / "wal" / "0"
    before = read_logged(log)
    assert sum(map(len, before.values())) >= 60
    resumed, undisturbed, again = results(host([requests("r"), requests("u"), requests("r")], **options))
    for index, prompt in enumerate(PROMPTS):
        mine, other, third = (got[f"{index}"] for got in (resumed, undisturbed, again))
        assert mine["tokens"] == other["tokens"] == third["tokens"]
        found = logged_as(log, mine["tokens"], attempts=2)
        assert found.routes is not None
        assert found.routes.valid_T.all()
        # One row for each token but the last, prompt included: for the client, as if nothing had happened.
        assert len(mine["routes"]) == len(other["routes"]) == len(prompt) + len(mine["tokens"]) - 1
        assert mine["routes"][len(prompt) - 1 :] == found.routes.value_T.tolist()
        assert third["routes"] == found.routes.value_T.tolist()
        early = next(r for r in before.values() if r.rollout == found.rollout)
        assert early.routes is not None
        assert found.routes.value_T[: len(early)].tolist() == early.routes.value_T.tolist()
        assert len(np.unique(found.routes.value_T.reshape(-1, 4), axis=0)) > 3, (
            "all routes are alike: nothing is tested"
        )


def test_a_resumed_request_hands_out_the_routes_of_the_first_time() -> None:
    """The prefill of a resume routes all tokens again, and may do so otherwise."""
    from rollout_wal.engines.common.routes import Routes
    from rollout_wal.engines.vllm.rollout import Rollout

    rollout = Rollout.__new__(Rollout)
    rollout.wants_logprobs = True
    logged = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    rollout._resumed = Routes(logged, np.ones(3, np.bool_))
    prefilled = np.full((9, 2, 2), 99, np.uint8)
    first = EngineCoreOutput("r", [5], routed_experts=prefilled)
    rollout.release(first)
    assert first.routed_experts is not None
    assert first.routed_experts[5:8].tolist() == logged.tolist()
    assert first.routed_experts[:5].tolist() == prefilled[:5].tolist()
    assert first.routed_experts[8:].tolist() == prefilled[8:].tolist()
    later = EngineCoreOutput("r", [5], routed_experts=prefilled[:1])
    rollout.release(later)
    assert later.routed_experts is not None
    assert later.routed_experts.tolist() == prefilled[:1].tolist()


QUICK = "it_is_an_engine or 0.3 or saved_kv"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("which", [QUICK, pytest.param("not refused", marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_engine_on_model_runner_v2(which: str) -> None:
    """The adapter's tests once more: prefill in parts, resume, KV, and the rest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which]
    done = subprocess.run(
        [*command, str(HERE / "test_vllm_engine.py")],
        env={**os.environ, "MODEL_RUNNER": "v2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
