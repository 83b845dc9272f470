"""`vllm serve` with the log inside: killed at random, restarted, asked again. What a client has heard comes again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from rollout_wal.engines.common.logged import read_logged
from rollout_wal.params import SamplingParams

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(4, 380, size=int(n)).tolist() for n in (5, 80, 33, 12, 150, 7)]
SAMPLING = [
    SamplingParams(max_tokens=n, temperature=t, top_p=p, ignore_eos=True, presence_penalty=q)
    for n, t, p, q in ((300, 1.0, 1.0, 0.0), (280, 0.8, 0.95, 0.0), (260, 1.0, 1.0, 0.3)) * 2
]

VICTIMS = ["EngineCore", "Worker", "FrontEnd", "Tree", "Term"]
"""Term: SIGTERM to all processes, which then end by themselves. The others: SIGKILL."""


def body(index: int, name: str = "r") -> dict[str, Any]:
    s = SAMPLING[index]
    return {
        "prompt": PROMPTS[index],
        "max_tokens": s.max_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "presence_penalty": s.presence_penalty,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": True,
        "return_token_ids": True,
        "vllm_xargs": {"rollout": f"{name}{index}", "rollout_key": 500 + index},
    }


def reference(engine: Any, tools: SimpleNamespace) -> dict[int, list[Any]]:
    requests = [
        tools.request_of(i, p, s, noise_key=500 + i) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLING, strict=True))
    ]
    rows: dict[int, list[Any]] = tools.drive(engine, requests)
    return rows


async def ask(server: Any, tools: SimpleNamespace, act: Callable[[], None] | None, after: int) -> list[Any]:
    """Ask for all rollouts; `act` once they have so many tokens together."""
    heard = [tools.Heard() for _ in PROMPTS]
    asking = asyncio.gather(*(tools.stream(server.url, body(i), heard[i]) for i in range(len(PROMPTS))))
    if act is not None:
        while sum(len(h.tokens) for h in heard) < after and not asking.done():
            await asyncio.sleep(0.01)
        act()
    await asking
    return heard


def test_over_http_the_front_end_gives_its_reasons_and_the_engine_core_has_them_in_the_log(
    serve: Any, tmp_path: Path
) -> None:
    server = serve(one_process=True)
    server.wait_ready()
    plain = {**body(0), "stream": False, "max_tokens": 4}
    with httpx.Client(verify=False, timeout=60) as client:

        def answer(**more: Any) -> httpx.Response:
            asked = {**plain, **more, "vllm_xargs": {**plain["vllm_xargs"], **more.get("vllm_xargs", {})}}
            return client.post(f"{server.url}/v1/completions", json=asked)

        told = answer(n=2)
        assert told.status_code == 400
        assert "Send a request for each" in told.text
        told = answer(vllm_xargs={"rollout_attemp": 1})
        assert told.status_code == 400
        assert "unknown rollout parameters ['rollout_attemp']. The request was not accepted" in told.text
        untold = answer(vllm_xargs={"rollout_prefix": 500})
        assert untold.status_code == 500
        assert "Submit token ids" not in untold.text
        assert "Submit token ids" in (tmp_path / "server.log").read_text()
        assert answer().status_code == 200


@pytest.mark.timeout(1800)
def test_killed_at_random_and_asked_again(
    engine: Any, serve: Any, tools: SimpleNamespace, tmp_path: Path, kills: int
) -> None:
    expected = reference(engine, tools)
    rng = random.Random(kills)
    known: list[list[int]] = [[] for _ in PROMPTS]
    total = sum(s.max_tokens for s in SAMPLING)
    for kill in range(kills):
        victim = VICTIMS[kill] if kill < len(VICTIMS) else rng.choice(VICTIMS)
        server = serve(one_process=victim != "Worker")
        server.wait_ready()
        have = sum(map(len, known))
        after = min(have + rng.randrange(30, 250), total - 100)
        heard = asyncio.run(ask(server, tools, lambda s=server, v=victim: s.kill(v), after))
        server.wait_dead()
        for index, h in enumerate(heard):
            # What was heard before begins every later answer, whoever was killed; nothing of it was drawn anew.
            if len(h.tokens) >= len(known[index]):
                known[index] = h.tokens
            assert [t for t, *_ in expected[index]][: len(h.tokens)] == h.tokens, (kill, victim, index)
        by_tokens = {tuple(r.token_T[:5].tolist()): r for r in read_logged(tmp_path / "wal" / "0").values()}
        for tokens in known:
            if len(tokens) >= 5:
                assert by_tokens[tuple(tokens[:5])].token_T[: len(tokens)].tolist() == tokens
    server = serve(one_process=True)
    server.wait_ready()
    final = asyncio.run(ask(server, tools, None, 0))
    for index, h in enumerate(final):
        assert not h.failed
        assert h.finish == "length"
        assert h.tokens == [t for t, *_ in expected[index]]
        np.testing.assert_allclose(h.logprobs, [lp for _, lp, *_ in expected[index]], atol=1e-4)
    # Asked for once more, all of them are answered from the log alone.
    again = asyncio.run(ask(server, tools, None, 0))
    assert [h.tokens for h in again] == [h.tokens for h in final]
    assert [h.logprobs for h in again] == [h.logprobs for h in final]
