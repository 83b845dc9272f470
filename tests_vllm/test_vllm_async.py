"""`AsyncLLM` with the log inside: what is heard is durable; pauses, aborts, new weights, memory pressure, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rollout_wal.engines.base import FinishReason
from rollout_wal.engines.common.logged import Logged, read_logged, read_named
from rollout_wal.params import SamplingParams

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(4, 380, size=int(n)).tolist() for n in (5, 80, 33, 12, 150, 7, 60, 20)]
KEY = 900


class Client:
    """An AsyncLLM on an event loop of its own, and what its log holds."""

    def __init__(self, model: Path, log: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.log = log / "0"
        self.loop = asyncio.new_event_loop()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    model=str(model),
                    enforce_eager=True,
                    dtype="float32",
                    block_size=32,
                    max_num_seqs=8,
                    num_gpu_blocks_override=40,
                    max_num_batched_tokens=64,
                    disable_log_stats=True,
                    scheduler_cls="rollout_wal.engines.vllm.scheduler.LoggingScheduler",
                    logits_processors=["rollout_wal.engines.vllm.processor:PositionNoise"],
                    additional_config={"rollout_wal": {"log": str(log)}},
                )
            )

        self.engine = self.run(start())
        self._asked = 0
        self.why: int | str | None = None
        """Stop reason of the request that ended last."""

    def run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(what, 120))

    async def ask(
        self, index: int, name: str | int | None, *, upto: int | None = None, prompt: Any = None, **params: Any
    ) -> tuple[list[int], str | None, list[float]]:
        """(tokens, finish reason, logprobs) of one streamed request; gives up after `upto` tokens."""
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        self._asked += 1
        extra = {k: params.pop(k) for k in [*params] if k.startswith("rollout_")}
        if name is not None:
            extra = {"rollout": name, "rollout_key": KEY + index, **extra}
        options = {"max_tokens": 120, "ignore_eos": True, "logprobs": 0, "detokenize": False, **params}
        sampling = VllmParams(output_kind=RequestOutputKind.DELTA, extra_args=extra or None, **options)
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = None
        source = {"prompt_token_ids": PROMPTS[index] if prompt is None else prompt}
        async for output in self.engine.generate(source, sampling, request_id=f"{self._asked}"):
            (choice,) = output.outputs
            tokens += choice.token_ids
            logprobs += [next(iter(d.values())).logprob for d in choice.logprobs or ()]
            finish = choice.finish_reason
            self.why = choice.stop_reason
            if upto is not None and len(tokens) >= upto:
                break
        return tokens, finish, logprobs

    def logged(self, tokens: list[int]) -> list[Logged]:
        """The rollouts that begin with these tokens."""
        return [r for r in read_logged(self.log).values() if r.token_T[: len(tokens)].tolist() == tokens]


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(model, tmp_path_factory.mktemp("wal"))
    yield client

    async def stop() -> None:
        # On its loop: elsewhere it leaves sockets open, for which the interpreter waits at its end.
        client.engine.shutdown()
        await asyncio.sleep(0.5)

    client.run(stop())


@pytest.fixture(scope="module")
def expected(engine: Any, tools: SimpleNamespace) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=120, ignore_eos=True)
    requests = [tools.request_of(i, p, sampling, noise_key=KEY + i) for i, p in enumerate(PROMPTS)]
    rows = tools.drive(engine, requests)
    return [[r[0] for r in rows[i]] for i in range(len(PROMPTS))]


async def ask_all(client: Client, name: str, **params: Any) -> list[Any]:
    return list(await asyncio.gather(*(client.ask(i, f"{name}{i}", **params) for i in range(len(PROMPTS)))))


def test_what_is_heard_is_durable(client: Client, expected: list[list[int]]) -> None:
    async def listen() -> None:
        task = asyncio.gather(*(client.ask(i, f"heard{i}", upto=40 + i) for i in range(8)))
        await task
        for i, (tokens, _, _) in enumerate(task.result()):
            assert tokens == expected[i][: len(tokens)]
            (rollout,) = client.logged(tokens)
            assert rollout.finish is FinishReason.RUNNING

    client.run(listen())


def test_under_memory_pressure_all_finish_and_are_logged_once(client: Client, expected: list[list[int]]) -> None:
    # 8 rollouts of up to 270 tokens in 40 blocks of 32: some are preempted and computed again.
    got = client.run(ask_all(client, "pressed"))
    for i, (tokens, finish, logprobs) in enumerate(got):
        assert tokens == expected[i]
        assert finish == "length"
        (rollout,) = read_named(client.log, f"pressed{i}")
        assert rollout.finish is FinishReason.MAX_TOKENS
        assert rollout.token_T.tolist() == tokens
        np.testing.assert_array_equal(rollout.logprob.value_T, np.array(logprobs, np.float32))
        assert rollout.sampling_logprob.valid_T.all()


def test_logprobs_are_logged_for_clients_that_asked_for_none(client: Client, expected: list[list[int]]) -> None:
    tokens, _, logprobs = client.run(client.ask(7, "unasked", logprobs=None, max_tokens=30))
    assert tokens == expected[7][:30]
    assert not logprobs
    (rollout,) = [r for r in client.logged(tokens) if len(r) == 30]
    assert rollout.logprob.valid_T.all()
    assert rollout.sampling_logprob.valid_T.all()


def test_who_asks_again_gets_the_same_from_where_it_stood(client: Client, expected: list[list[int]]) -> None:
    async def twice() -> list[Any]:
        await asyncio.gather(*(client.ask(i, f"twice{i}", upto=15) for i in range(8)))
        return await ask_all(client, "twice")

    assert [tokens for tokens, *_ in client.run(twice())] == expected
    attempts = {r.attempts for i in range(8) for r in client.logged(expected[i])}
    assert 2 in attempts


def test_asking_again_while_it_runs_cuts_the_earlier_request_off(client: Client, expected: list[list[int]]) -> None:
    async def both() -> Any:
        first = asyncio.ensure_future(client.ask(4, "again"))
        await asyncio.sleep(0.1)
        return await asyncio.gather(first, client.ask(4, "again"))

    (early, early_finish, _), (late, late_finish, _) = client.run(both())
    assert (late, late_finish) == (expected[4], "length")
    assert early == expected[4][: len(early)]
    assert early_finish in ("abort", "length")  # the latter if it was faster than the second


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pauses_lose_nothing(client: Client, expected: list[list[int]], mode: str) -> None:
    async def pause() -> list[Any]:
        asking = asyncio.ensure_future(ask_all(client, f"pause-{mode}"))
        await asyncio.sleep(0.15)
        await client.engine.pause_generation(mode=mode)
        before = {r.rollout: len(r) for r in read_logged(client.log).values()}
        await asyncio.sleep(0.2)
        # Paused: everything sampled is durable, and nothing more is sampled.
        assert {r.rollout: len(r) for r in read_logged(client.log).values()} == before
        await client.engine.resume_generation()
        return await asking

    got = client.run(pause())
    for i, (tokens, _, _) in enumerate(got):
        assert tokens == expected[i][: len(tokens)]
    if mode == "abort":
        got = client.run(ask_all(client, f"pause-{mode}"))
    assert [(tokens, finish) for tokens, finish, _ in got] == [(e, "length") for e in expected]


def test_a_front_end_that_resumes_by_itself(client: Client, expected: list[list[int]], tools: SimpleNamespace) -> None:
    async def resume() -> Any:
        return await asyncio.gather(
            client.ask(
                1, 77, prompt=PROMPTS[1] + expected[1][:50], rollout_prefix=50, rollout_attempt=3, max_tokens=120
            ),
            client.ask(2, 78, rollout_attempt=2),
        )

    (tail, finish, _), (whole, _, _) = client.run(resume())
    assert expected[1][:50] + tail == expected[1]
    assert finish == "length"
    assert whole == expected[2]
    logged = read_logged(client.log)
    assert logged[78].token_T.tolist() == expected[2]
    assert logged[78].attempts == 2


def test_every_parameter_is_right_on_resume(client: Client, engine: Any, tools: SimpleNamespace) -> None:
    cases: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.4, "top_k": 10, "min_tokens": 90, "ignore_eos": False},
        {"min_p": 0.1, "presence_penalty": 1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"temperature": 0.0},
        {"stop_token_ids": list(range(50, 54)), "min_tokens": 20, "ignore_eos": False},
    ]
    requests = [
        tools.request_of(
            i,
            PROMPTS[i],
            SamplingParams(
                **{"max_tokens": 120, "ignore_eos": True, **c, "stop_token_ids": tuple(c.get("stop_token_ids", ()))}
            ),
            noise_key=KEY + i,
        )
        for i, c in enumerate(cases)
    ]
    rows = tools.drive(engine, requests)

    async def twice() -> list[Any]:
        await asyncio.gather(*(client.ask(i, "params", upto=10, **c) for i, c in enumerate(cases)))
        return list(await asyncio.gather(*(client.ask(i, "params", **c) for i, c in enumerate(cases))))

    for i, (tokens, finish, _) in enumerate(client.run(twice())):
        assert tokens == [r[0] for r in rows[i]], cases[i]
        assert finish == ("length" if rows[i][-1][3] == FinishReason.MAX_TOKENS else "stop")
        (rollout,) = client.logged(tokens)
        assert rollout.finish == rows[i][-1][3]
        np.testing.assert_allclose(rollout.logprob.value_T, [r[1] for r in rows[i]], atol=1e-5)
        np.testing.assert_allclose(rollout.sampling_logprob.value_T, [r[2] for r in rows[i]], atol=1e-5)
        assert rollout.sampling_logprob.valid_T.all()


def test_bad_words_span_a_resume(client: Client, expected: list[list[int]], model: Path) -> None:
    """A forbidden pair, of which the first token is logged before the resume and the second would come after it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encoded(pair: list[int]) -> list[int]:
        ids: list[int] = tokenizer.encode(tokenizer.decode(pair), add_special_tokens=False)
        return ids

    output = expected[3]
    at = next(i for i in range(8, 100) if encoded(output[i : i + 2]) == output[i : i + 2])
    pair, text = output[at : at + 2], tokenizer.decode(output[at : at + 2])

    async def run(upto: int | None) -> list[int]:
        tokens: list[int] = (await client.ask(3, "bad-words", upto=upto, bad_words=[text]))[0]
        return tokens

    first = client.run(run(at + 1))
    whole = client.run(run(None))
    assert whole[: len(first)] == first
    assert whole[: at + 1] == output[: at + 1], "the word came earlier: the test tests nothing"
    assert len(whole) == 120
    assert all(whole[i : i + 2] != pair for i in range(119))


def test_stop_strings_cut_at_the_same_place_on_every_answer(
    client: Client, expected: list[list[int]], model: Path
) -> None:
    """vLLM's front end finds them: the log holds what was sampled, and every answer from it is cut again."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(model).decode(expected[6])
    stop = text[len(text) // 2 :][:4]

    async def answers() -> list[Any]:
        # The same noise and sampling under two names: one is interrupted, the other is not.
        whole = await client.ask(6, "stop-whole", stop=[stop], detokenize=True)
        await client.ask(6, "stop-cut", upto=10, stop=[stop], detokenize=True)
        resumed = await client.ask(6, "stop-cut", stop=[stop], detokenize=True)
        again = await client.ask(6, "stop-cut", stop=[stop], detokenize=True)
        return [whole, resumed, again]

    whole, resumed, again = client.run(answers())
    assert whole[1] == resumed[1] == again[1] == "stop"
    assert 10 < len(whole[0]) < 120
    assert resumed[0][: len(whole[0])] == whole[0] == expected[6][: len(whole[0])]
    assert again[0][: len(whole[0])] == whole[0]


def test_weights_are_logged_with_their_version(client: Client) -> None:
    client.run(client.engine.update_weight_version("3"))
    tokens, _, _ = client.run(client.ask(0, "v3"))
    assert any(set(r.version_T.tolist()) == {3} for r in client.logged(tokens))
    with pytest.raises(Exception, match="is no number"):
        client.run(client.engine.update_weight_version("latest"))


async def replace_weights(client: Client) -> None:
    """As trainers do it that know nothing of versions."""
    await client.engine.collective_rpc("reload_weights")


async def half_replace_weights(client: Client) -> None:
    """It fails, for weight transfer is not configured; the engine core cannot know how far it came."""
    with pytest.raises(Exception, match="eight transfer not configured"):
        await client.engine.finish_weight_update(weight_version="99")


@pytest.mark.parametrize("replace", [replace_weights, half_replace_weights])
def test_nothing_is_logged_under_weights_that_nobody_named(
    client: Client, expected: list[list[int]], replace: Callable[[Client], Coroutine[Any, Any, None]]
) -> None:
    name = f"nameless-{replace.__name__}"

    async def interrupted() -> list[int]:
        await client.engine.update_weight_version("20")
        asking = asyncio.ensure_future(client.ask(4, name))
        while sum(map(len, read_named(client.log, name))) < 10:
            await asyncio.sleep(0.01)
        await replace(client)
        tokens, finish, _ = await asking
        assert finish == "error"
        return list(tokens)

    tokens = client.run(interrupted())
    assert "no version was named since" in str(client.why)
    assert "update_weight_version" in str(client.why)
    (before,) = read_named(client.log, name)
    assert before.token_T.tolist() == tokens == expected[4][: len(tokens)]
    assert 10 <= len(tokens) < 120
    # Until somebody names them nothing goes on, but for requests that are not logged.
    assert client.run(client.ask(4, name))[:2] == (tokens, "error")
    assert client.run(client.ask(4, None, temperature=0.0, max_tokens=3))[1] == "length"
    (still,) = read_named(client.log, name)
    assert still.token_T.tolist() == tokens
    client.run(client.engine.update_weight_version("21"))
    assert client.run(client.ask(4, name))[:2] == (expected[4], "length")
    (after,) = read_named(client.log, name)
    assert after.version_T.tolist() == [20] * len(tokens) + [21] * (120 - len(tokens))


def test_weights_that_are_replaced_and_named_in_a_pause_end_nothing(client: Client, expected: list[list[int]]) -> None:
    async def paused() -> Any:
        asking = asyncio.ensure_future(client.ask(5, "named-in-a-pause"))
        while sum(map(len, read_named(client.log, "named-in-a-pause"))) < 10:
            await asyncio.sleep(0.01)
        await client.engine.collective_rpc("check_health")  # replaces nothing
        await client.engine.pause_generation(mode="keep")
        await client.engine.collective_rpc("reload_weights")
        await client.engine.update_weight_version("22")
        await client.engine.resume_generation()
        return await asking

    assert client.run(paused())[:2] == (expected[5], "length")
    (logged,) = read_named(client.log, "named-in-a-pause")
    assert set(logged.version_T.tolist()) == {21, 22}


def test_released_rollouts_are_forgotten(client: Client, expected: list[list[int]]) -> None:
    before = len(client.logged(expected[5][:20]))
    client.run(client.ask(5, "released", max_tokens=20))
    assert len(client.logged(expected[5][:20])) == before + 1
    client.run(client.ask(6, "releasing", max_tokens=5, rollout_release=["released", "unknown"]))
    assert len(client.logged(expected[5][:20])) == before


def test_a_stale_attempt_is_refused_and_harms_nobody(client: Client, expected: list[list[int]]) -> None:
    async def both() -> Any:
        first = asyncio.ensure_future(client.ask(2, 90, rollout_attempt=5))
        await asyncio.sleep(0.05)
        stale = await asyncio.gather(
            client.ask(2, 90, rollout_attempt=5, upto=1),
            client.ask(3, 91, rollout_prefix=500),
        )
        return await first, stale

    (tokens, finish, _), stale = client.run(both())
    assert [s[:2] for s in stale] == [([], "error")] * 2
    assert (tokens, finish) == (expected[2], "length")
    client.run(client.ask(3, 91, rollout_prefix=500))
    assert "Submit token ids, at least one before the prefix" in str(client.why)


def test_other_requests_are_not_touched(client: Client) -> None:
    count = len(read_logged(client.log))
    tokens, finish, logprobs = client.run(client.ask(0, None, temperature=0.0, max_tokens=7))
    assert (len(tokens), finish, len(logprobs)) == (7, "length", 7)
    assert len(read_logged(client.log)) == count


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 2}, "n=2"),
        ({"rollout_prefix": -1}, "rollout_prefix"),
        ({"rollout_attempt": True}, "rollout_attempt=True is out of range"),
        ({"rollout_release": [True]}, "rollout_release=.* is no list of ids"),
        ({"rollout_attemp": 1}, "unknown rollout parameters"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"structured_outputs": "regex"}, "structured_outputs"),
    ],
)
def test_what_cannot_be_resumed_is_refused(client: Client, params: dict[str, Any], message: str) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in params:
        params = {"structured_outputs": StructuredOutputsParams(regex="a*")}
    with pytest.raises(Exception, match=message):
        client.run(client.ask(0, "refused", **params))
