"""The plug-in in a real `sglang.Engine`: what leaves the scheduler is logged; asked for again, a rollout goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from rollout_wal.engines.base import FinishReason
from rollout_wal.engines.common.logged import Logged, read_logged
from rollout_wal.params import SamplingParams

#: SGLang's own switch for tests: it retracts running requests every so many forward passes.
RETRACTING = {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "50"}
#: Smaller than by default, so that it shows that the log is set up as its operator says.
SMALL_FILES = {"ROLLOUT_WAL_SGLANG_SEGMENT_BYTES": str(1 << 20)}


@pytest.fixture(scope="module")
def server(server_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    # Overlapped, as on a GPU: each step is drawn before the one before it is appended. SGLang starts its processes
    # itself, each of which loads the plug-in.
    running = server_of(
        tmp_path_factory.mktemp("plugin") / "wal",
        spawn=True,
        variables={**RETRACTING, **SMALL_FILES},
        disable_overlap_schedule=False,
    ).wait_ready()
    yield running
    running.end()


def logged(server: Any, rollout: int) -> Logged:
    return read_logged(server.log / "0")[rollout]


def pause(server: Any, mode: str) -> None:
    """Returns when SGLang says that it has paused."""
    before = sum(e["event"] == "done" and e["do"] == "pause" for e in server.events)
    server.order(do="pause", mode=mode)
    server.told("pause", before + 1)


def prompt_of(seed: int, length: int = 12) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 384) for _ in range(length)]


PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"min_new_tokens": 25, "stop_token_ids": list(range(4, 40))},
    {"temperature": 0.0},
)


def ours(params: dict[str, Any]) -> SamplingParams:
    renamed = {{"min_new_tokens": "min_tokens"}.get(k, k): v for k, v in params.items()}
    return SamplingParams(**{"max_tokens": 40, **renamed, "stop_token_ids": tuple(renamed.get("stop_token_ids", ()))})


def test_what_is_shown_is_logged_and_is_what_the_embedded_engine_draws(server: Any, engine: Any, tools: Any) -> None:
    prompts = [prompt_of(i, 3 + 7 * i) for i in range(12)]
    for i, prompt in enumerate(prompts):
        server.generate(f"a{i}", prompt, custom_params={"rollout": 100 + i, "rollout_key": i}, **PARAMS[i % 6])
    requests = [tools.request_of(i, p, ours(PARAMS[i % 6]), noise_key=i) for i, p in enumerate(prompts)]
    expected = tools.drive(engine, requests)
    for i in range(12):
        out, kept = server.ended(f"a{i}"), logged(server, 100 + i)
        assert out["tokens"] == kept.token_T.tolist() == [r[0] for r in expected[i]]
        np.testing.assert_allclose(out["logprobs"], [r[1] for r in expected[i]], atol=2e-4)
        np.testing.assert_allclose(kept.logprob.value_T, [r[1] for r in expected[i]], atol=2e-4)
        np.testing.assert_allclose(kept.sampling_logprob.value_T, [r[2] for r in expected[i]], atol=2e-4)
        assert kept.finish == expected[i][-1][3]
        assert kept.attempts == 1


def test_the_log_is_set_up_by_the_environment(server: Any) -> None:
    assert max(path.stat().st_size for path in (server.log / "0").rglob("*")) == 1 << 20


def test_a_rollout_that_had_ended_is_answered_from_the_log(server: Any) -> None:
    prompt = prompt_of(50)
    server.generate("b", prompt, rollout="once")
    first = server.ended("b")
    server.generate("b-again", prompt, rollout="once")
    again = server.ended("b-again")
    assert first["tokens"] == again["tokens"]
    assert first["text"] == again["text"]
    assert first["finish"] == again["finish"]
    np.testing.assert_allclose(first["logprobs"], again["logprobs"], atol=1e-6)
    assert sum(k.attempts for k in read_logged(server.log / "0").values() if k.token_T.tolist() == first["tokens"]) == 1
    # The same name and another prompt is another rollout; so is the same prompt without a name.
    server.generate("b-other", prompt_of(51), rollout="once")
    assert server.ended("b-other")["tokens"] != first["tokens"]


def test_aborted_and_asked_for_again_it_goes_on(server: Any, engine: Any, tools: Any) -> None:
    prompt = prompt_of(60)
    params = {"max_new_tokens": 200, "ignore_eos": True, "frequency_penalty": 0.2}
    sampling = SamplingParams(max_tokens=200, ignore_eos=True, frequency_penalty=0.2)
    (rows,) = tools.drive(engine, [tools.request_of(0, prompt, sampling, noise_key=9)]).values()
    server.generate("c", prompt, custom_params={"rollout": 7, "rollout_key": 9}, stream=True, **params)
    tools.wait_until(lambda: len(server.of("shown", "c")) > 20)
    server.order(do="abort", id="c")
    cut = server.ended("c")
    assert cut["finish"]["type"] == "abort"
    assert 20 < len(cut["tokens"]) < 200
    assert logged(server, 7).token_T.tolist()[: len(cut["tokens"])] == cut["tokens"]
    assert logged(server, 7).finish is FinishReason.RUNNING
    server.generate("c2", prompt, custom_params={"rollout": 7, "rollout_key": 9}, stream=True, **params)
    out = server.ended("c2")
    assert out["tokens"] == [r[0] for r in rows] == logged(server, 7).token_T.tolist()
    np.testing.assert_allclose(out["logprobs"], [r[1] for r in rows], atol=2e-4)
    assert logged(server, 7).attempts == 2
    # What was logged came at once: the first that was shown is already longer than one token.
    assert len(server.of("shown", "c2")[0]["output"]["tokens"]) > 20


def test_a_second_request_takes_a_running_rollout_over(server: Any, tools: Any) -> None:
    prompt, params = prompt_of(61), {"max_new_tokens": 250, "ignore_eos": True}
    server.generate("d", prompt, rollout="twice", stream=True, **params)
    tools.wait_until(lambda: len(server.of("shown", "d")) > 5)
    server.generate("d2", prompt, rollout="twice", **params)
    first, second = server.ended("d"), server.ended("d2")
    assert first["finish"]["type"] == "abort"
    assert len(second["tokens"]) == 250
    assert second["tokens"][: len(first["tokens"])] == first["tokens"]


def test_a_front_end_that_keeps_attempts_resumes_by_itself(server: Any, engine: Any, tools: Any) -> None:
    prompt, sampling = prompt_of(62), SamplingParams(max_tokens=40, ignore_eos=True, presence_penalty=1.0)
    (rows,) = tools.drive(engine, [tools.request_of(0, prompt, sampling, noise_key=3)]).values()
    tokens = [r[0] for r in rows]
    extra = {"rollout": 62, "rollout_key": 3, "rollout_attempt": 4, "rollout_prefix": 15}
    params = {"max_new_tokens": 40, "ignore_eos": True, "presence_penalty": 1.0}  # of the whole rollout
    server.generate("e", prompt + tokens[:15], custom_params=extra, **params)
    assert server.ended("e")["tokens"] == tokens[15:]
    server.generate("e2", prompt + tokens[:15], custom_params=extra, **params)
    assert "not newer than attempt 4" in server.ended("e2")["finish"]["message"]


def test_stop_strings_end_a_rollout_and_are_found_again(server: Any, model: Path) -> None:
    prompt = prompt_of(63)
    params = {"max_new_tokens": 120, "ignore_eos": True}
    server.generate("f0", prompt, custom_params={"rollout": "text", "rollout_key": 5}, **params)
    whole = server.ended("f0")
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Two tokens that were sampled one after the other, and whose text is no part of what precedes them.
    pieces = (tokenizer.decode(whole["tokens"][at : at + 2]) for at in range(40, 110))
    stop = next(p for p in pieces if p.isalnum() and len(p) > 1 and p not in whole["text"][:80])
    stopped = {"rollout": "stopped", "rollout_key": 5}
    server.generate("f", prompt, custom_params=stopped, stop=[stop], **params)
    first = server.ended("f")
    server.generate("f2", prompt, custom_params=stopped, stop=[stop], **params)
    again = server.ended("f2")
    assert first["finish"] == {"type": "stop", "matched": stop}
    assert (again["tokens"], again["text"], again["finish"]) == (first["tokens"], first["text"], first["finish"])
    kept = [k for k in read_logged(server.log / "0").values() if k.finish is FinishReason.STOP_STRING]
    assert [k.token_T.tolist() for k in kept] == [first["tokens"]]
    # Under the same name without the stop string, nothing that it had ended is taken for the answer.
    server.generate("f3", prompt, custom_params=stopped, **params)
    assert server.ended("f3")["tokens"] == whole["tokens"]


def test_requests_without_a_rollout_pass(server: Any) -> None:
    before = len(read_logged(server.log / "0"))
    server.generate("g", prompt_of(64), temperature=0.0)
    assert server.ended("g")["tokens"]
    assert len(read_logged(server.log / "0")) == before


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"sampling_seed": 3}, "silently ignored"),
        ({"rollout": "x", "json_schema": "{}"}, "json_schema cannot be combined"),
        ({"rollout": "x", "n": 2}, "n=2 with a rollout id"),
        ({"rollout": "x", "logit_bias": {"5": 1.0}}, "logit_bias cannot be combined"),
        ({"custom_params": {"rollout": -1}}, "is no id"),
        ({"custom_params": {"rollout": "x", "rollout_kex": 1}}, "unknown rollout parameters"),
        ({"custom_params": {"rollout": "x", "rollout_prefix": 99}}, "leaves no prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused(server: Any, params: dict[str, Any], words: str) -> None:
    name = f"h{sorted(params)}{params.get('custom_params')}"
    server.generate(name, prompt_of(65), **params)
    out = server.ended(name)
    assert words in (out.get("error") or out["finish"]["message"])


def test_retraction_changes_nothing(server: Any, engine: Any, tools: Any) -> None:
    prompts, length = [prompt_of(80 + i) for i in range(8)], 300
    sampling = SamplingParams(max_tokens=length, ignore_eos=True, presence_penalty=0.3)
    requests = [tools.request_of(i, p, sampling, noise_key=i) for i, p in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        extra = {"rollout": 500 + i, "rollout_key": i}
        params = {"max_new_tokens": length, "ignore_eos": True, "presence_penalty": 0.3}
        server.generate(f"pressed{i}", prompt, custom_params=extra, **params)
    expected = tools.drive(engine, requests)
    outputs = [server.ended(f"pressed{i}") for i in range(8)]
    assert sum(out["retractions"] for out in outputs) > 0
    for i, out in enumerate(outputs):
        kept = logged(server, 500 + i)
        assert out["tokens"] == kept.token_T.tolist() == [r[0] for r in expected[i]]
        np.testing.assert_allclose(out["logprobs"], [r[1] for r in expected[i]], atol=2e-4)
        assert kept.attempts == 1


def test_a_pause_that_aborts_interrupts_and_the_same_requests_go_on(server: Any, engine: Any, tools: Any) -> None:
    prompts, length = [prompt_of(90 + i) for i in range(3)], 200
    sampling = SamplingParams(max_tokens=length, ignore_eos=True)
    expected = tools.drive(engine, [tools.request_of(i, p, sampling, noise_key=i) for i, p in enumerate(prompts)])
    params = {"max_new_tokens": length, "ignore_eos": True}

    def ask(name: str) -> None:
        for i, prompt in enumerate(prompts):
            extra = {"rollout": 520 + i, "rollout_key": i}
            server.generate(f"{name}{i}", prompt, custom_params=extra, stream=True, **params)

    ask("cut")
    tools.wait_until(lambda: all(len(server.of("shown", f"cut{i}")) > 10 for i in range(3)))
    pause(server, "abort")
    for i in range(3):
        cut, kept = server.ended(f"cut{i}"), logged(server, 520 + i)
        assert cut["finish"]["type"] == "abort"
        assert kept.finish is FinishReason.RUNNING
        assert cut["tokens"] == kept.token_T.tolist()[: len(cut["tokens"])]
    server.order(do="continue")
    ask("on")
    for i in range(3):
        assert (
            server.ended(f"on{i}")["tokens"] == [r[0] for r in expected[i]] == logged(server, 520 + i).token_T.tolist()
        )
        assert logged(server, 520 + i).attempts == 2


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_rollouts_go_on_and_their_versions_are_told(
    server: Any, engine: Any, model: Path, successor: Path, tools: Any, mode: str
) -> None:
    params = {"max_new_tokens": 150, "ignore_eos": True}
    base = 300 if mode == "retract" else 310
    for i in range(4):
        server.generate(f"{mode}{i}", prompt_of(70 + i), rollout=base + i, stream=True, **params)
    tools.wait_until(lambda: all(len(server.of("shown", f"{mode}{i}")) > 10 for i in range(4)))
    pause(server, mode)
    updates = sum(e["event"] == "done" and e["do"] == "update" for e in server.events)
    version = str(max(k.version_T.max() for k in read_logged(server.log / "0").values() if len(k)) + 1)
    source = successor if int(version) % 2 else model
    server.order(do="update", path=str(source), version="new", flush=mode == "retract")
    refused = server.told("update", updates + 1)
    assert not refused["ok"]
    assert "is no number" in refused["message"]
    server.order(do="update", path=str(Path(source).parent), version=version)
    assert "has the architecture digest" in server.told("update", updates + 2)["message"]
    server.order(do="update", path=str(source), version=version, flush=mode == "retract")
    assert server.told("update", updates + 3)["ok"]
    server.order(do="continue")
    for i in range(4):
        out, kept = server.ended(f"{mode}{i}"), logged(server, base + i)
        assert out["tokens"] == kept.token_T.tolist()
        assert len(kept) == 150
        spans = [int(v["version"]) for v in out["versions"] for _ in range(v["start"], v["end"])]
        assert spans == kept.version_T.tolist()
        assert set(spans) == {int(version) - 1, int(version)}
        # Asked for again, the spans come out of the log.
        server.generate(f"{mode}{i}again", prompt_of(70 + i), rollout=base + i, **params)
        assert server.ended(f"{mode}{i}again")["versions"] == out["versions"]
