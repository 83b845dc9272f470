"""SIGKILL to a server's scheduler, detokenizer or whole tree: what was shown is logged, and rollouts go on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rollout_wal.engines.common.logged import read_logged
from rollout_wal.params import SamplingParams

ROLES = ("scheduler", "detokenizer", "tree")
LENGTH = 300


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 384) for _ in range(rng.randrange(4, 40))] for _ in range(6)]


def test_random_kills(server_of: Callable[..., Any], engine: Any, tools: Any, kills: int, tmp_path: Path) -> None:
    rng = random.Random(11)
    order = [ROLES[i % 3] for i in range(kills)]
    rng.shuffle(order)
    shown_tokens = 0
    for start in range(0, kills, 5):
        shown_tokens += one_round(server_of, engine, tools, order[start : start + 5], rng, tmp_path / str(start))
    assert shown_tokens > 10 * kills


def one_round(
    server_of: Callable[..., Any], engine: Any, tools: Any, order: list[str], rng: random.Random, log: Path
) -> int:
    """Kill a server in each of these roles while it runs the same rollouts, and let them end. Returns tokens shown."""
    seed = rng.randrange(1 << 30)
    given = prompts(seed)
    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=0.9, top_p=0.95, presence_penalty=0.2)
    requests = [tools.request_of(i, p, sampling, noise_key=seed + i) for i, p in enumerate(given)]
    expected = tools.drive(engine, requests)
    params = {"max_new_tokens": LENGTH, "ignore_eos": True, "temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.2}
    shown_tokens = 0
    for life, role in enumerate([*order, None]):
        # Overlapped scheduling in every second life: the step after is drawn before this one is shown.
        server = server_of(log, disable_overlap_schedule=life % 2 == 0).wait_ready()
        for i, prompt in enumerate(given):
            extra = {"rollout": i, "rollout_key": seed + i}
            server.generate(f"r{i}", prompt, custom_params=extra, stream=True, **params)
        if role is None:
            outputs = [server.ended(f"r{i}") for i in range(len(given))]
            server.end()
            break
        want = rng.randrange(1, 60)
        tools.wait_until(lambda server=server, want=want: sum(e["event"] == "shown" for e in server.events) >= want)
        time.sleep(rng.random() * 0.1)
        if role == "tree":
            os.killpg(server.process.pid, signal.SIGKILL)
        else:
            os.kill(server.pids[role], signal.SIGKILL)
            time.sleep(0.2)  # what is in flight to the client still arrives
        server.end()
        kept = read_logged(log / "0")
        for i in range(len(given)):
            for event in server.of("shown", f"r{i}"):
                tokens = event["output"]["tokens"]
                assert tokens == kept[i].token_T.tolist()[: len(tokens)], f"{role}: shown and not logged"
                shown_tokens = max(shown_tokens, len(tokens))
            assert kept[i].token_T.tolist() == [r[0] for r in expected[i]][: len(kept[i])]
    kept = read_logged(log / "0")
    for i, out in enumerate(outputs):
        assert out["tokens"] == [r[0] for r in expected[i]] == kept[i].token_T.tolist()
        np.testing.assert_allclose(out["logprobs"], [r[1] for r in expected[i]], atol=3e-4)
        assert kept[i].logprob.valid_T.all()
    assert max(k.attempts for k in kept.values()) > 1
    return shown_tokens
