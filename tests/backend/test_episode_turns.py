"""Turns of episodes: stop strings, several calls, limits, broken parsers, weights, restarts and another owner."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout_wal.backend import RolloutBackend
from rollout_wal.dataset import SegmentKind
from rollout_wal.delivery import to_sample
from rollout_wal.engines.base import FinishReason
from rollout_wal.episode import BadToolCall, Episodes, ToolCall
from rollout_wal.errors import LogFenced
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model

sys.path.insert(0, str(Path(__file__).parent))
from episode_tools import ENDS, SAMPLING, Memory, Parser

Make = Callable[..., RolloutBackend]
#: Each start of a backend imports torch once more, which takes its time on a busy machine.
PATIENCE_S = 200.0


def generate(backend: RolloutBackend, prompts: Any, cohort: str = "c", **more: Any) -> dict[int, Any]:
    """With the same noise for every cohort: they are compared."""
    sampling = more.pop("sampling", SAMPLING)
    return {r.index: r for r in backend.generate(prompts[:4], sampling, seed=0, cohort=cohort, **more)}


def test_string_stops_cut_what_the_engine_ran_past_and_restarts_repeat_nothing(
    backend: Make, prompts: Any, tmp_path: Path, until: Any
) -> None:
    strings = ("a", "e", "t", "1", " ")
    whole, parts = Memory(), Memory()
    with backend(tmp_path / "one", workers=1, episodes=Episodes(whole, Parser(strings, ()))) as b:
        expected = generate(b, prompts)
    assert sum(r.turns for r in expected.values()) >= 4
    episodes = Episodes(parts, Parser(strings, ()))
    with backend(tmp_path / "two", workers=1, episodes=episodes) as b:
        b.generate(prompts[:4], SAMPLING, seed=0, cohort="c")
        until(lambda: b.stats.turns >= 2 or b.stats.finished, PATIENCE_S)
        b.kill_worker("0")
    with backend(tmp_path / "two", workers=1, episodes=episodes) as b:
        got = generate(b, prompts)
        info = b.info
    assert len(parts.ran) == len(set(parts.ran)) == len(whole.ran)
    for index, r in got.items():
        assert r.tokens.tolist() == expected[index].tokens.tolist()
        assert r.turns == expected[index].turns
        assert int(r.output.sampled_T.sum()) == 60, "what was observed does not count"
        assert r.episode.endswith(f"-{r.id}")
        sample = to_sample(r, info, SAMPLING)
        kinds = sample.segment_kinds[sample.prompt_length :]
        calls = (~r.output.sampled_T[1:] & r.output.sampled_T[:-1]).nonzero()[0]
        assert (kinds[~r.output.sampled_T] == SegmentKind.TOOL_OUTPUT).all()
        assert (kinds[calls] == SegmentKind.TOOL_CALL).all()
        assert len(calls) == r.turns == (kinds == SegmentKind.TOOL_CALL).sum(), "the span that the parser names"
        assert set(kinds[r.output.sampled_T].tolist()) <= {SegmentKind.SAMPLED, SegmentKind.TOOL_CALL}


def test_a_fenced_backend_dispatches_nothing(backend: Make, prompts: Any, until: Any) -> None:
    class Held(Memory):
        go = False

        async def work(self) -> None:
            while not self.go:
                await asyncio.sleep(0.01)

    old, new = Held(), Memory()
    with backend(workers=1, episodes=Episodes(old, Parser(), concurrency=1), grace_s=1.0) as first:
        iterator = first.generate(prompts[:4], SAMPLING, seed=0, cohort="c")
        until(lambda: len(old.ran) == 1 and first.stats.calling >= 2, PATIENCE_S)
        with backend(workers=1, take_over=True, episodes=Episodes(new, Parser())) as second:
            old.go = True  # what was dispatched before returns; the next one is refused
            with pytest.raises(LogFenced):
                list(iterator)
            got = generate(second, prompts)
            assert second.balance().holds
    assert len(old.ran) == 1
    assert old.attempts.isdisjoint(new.attempts)
    assert len(new.ran) == len(set(new.ran)) >= sum(r.turns for r in got.values())


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RolloutBackend, Parser, Memory]]:
    parser, tools = Parser(), Memory()
    with RolloutBackend(
        model,
        tmp_path_factory.mktemp("episodes") / "wal",
        slots=16,
        segment_bytes=1 << 18,
        episodes=Episodes(tools, parser, turns_max=4),
    ) as b:
        yield b, parser, tools


@pytest.fixture
def reads(shared: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(reads=, says=) -> for this test the parser does that."""

    def change(**how: Any) -> None:
        for name, what in how.items():
            monkeypatch.setattr(shared[1], name, what)

    return change


def raising(error: Exception) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("cannot read", {"reads": raising(ValueError("?"))}),
        ("cannot tell", {"says": raising(KeyError("?"))}),
        ("says nothing", {"says": lambda _: []}),
    ],
)
def test_a_parser_that_fails_censors_its_rollout(shared: Any, prompts: Any, reads: Any, what: str, how: Any) -> None:
    b, *_ = shared
    reads(**how)
    got = generate(b, prompts, what)
    censored = [r for r in got.values() if r.censored]
    assert censored
    for r in censored:
        assert r.censored == "parser-failed"
        assert int(r.tokens[-1]) in ENDS
        assert r.spans == ()
    assert b.balance().holds


def test_tokens_that_the_model_does_not_have_are_refused(shared: Any, prompts: Any, reads: Any) -> None:
    b, *_ = shared
    reads(says=lambda _: [100_000])
    got = generate(b, prompts, "alien")
    assert {r.censored.partition(":")[0] for r in got.values() if r.turns} == {"refused"}
    assert b.balance().holds


def test_a_malformed_call_is_told_and_no_tool_hears_of_it(shared: Any, prompts: Any, reads: Any) -> None:
    b, _, tools = shared
    before = len(tools.ran)
    reads(reads=raising(BadToolCall("[no]")))
    got = generate(b, prompts, "malformed")
    assert len(tools.ran) == before
    assert sum(r.turns for r in got.values()) >= 2
    for r in got.values():
        assert r.censored is None
        assert set(r.output.token_T[~r.output.sampled_T].tolist()) <= {100 + c for c in b"[no]"}
        assert r.spans == (), "no call"


def test_calls_of_a_turn_are_made_in_order_and_those_of_a_group_together(
    shared: Any, prompts: Any, reads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, _, tools = shared
    met = asyncio.Event()

    async def meet() -> None:
        """Nobody gets on before somebody else is here as well."""
        if tools.busy >= 2:
            met.set()
        await met.wait()

    monkeypatch.setattr(tools, "work", meet)
    start, tools.busiest = len(tools.ran), 0
    reads(reads=lambda token_T: [ToolCall("add", {"n": n}, span=(len(token_T) - 1, len(token_T))) for n in (7, 8)])
    metadata = [{"task": "t1"}]
    got = list(b.generate(prompts[:1], SAMPLING, group_size=4, cohort="two", metadata=metadata))
    assert tools.busiest >= 2
    ran = tools.ran[start:]
    for r in got:
        positions = [position for name, position, _ in ran if name == r.episode]
        assert positions == sorted(positions)
        assert [n for name, _, n in ran if name == r.episode] == [7, 8] * r.turns
        assert len(r.spans) == r.turns + (r.finish_reason is FinishReason.TURN_LIMIT)
        assert not r.turns or tools.metadata[r.episode] == {"task": "t1"}


def test_a_call_beyond_turns_max_is_a_call_that_nobody_makes(shared: Any, prompts: Any) -> None:
    b, _, tools = shared
    start = len(tools.ran)
    got = generate(b, prompts, "limit", sampling=SamplingParams(max_tokens=400, ignore_eos=True))
    assert {(r.finish_reason, r.turns) for r in got.values()} == {(FinishReason.TURN_LIMIT, 4)}
    assert len(tools.ran) - start == 4 * 4
    for r in got.values():
        assert r.spans[-1].end == len(r.tokens), "the policy said it; it is trained on as such"
        assert to_sample(r, b.info, SAMPLING).finish_reason == "turn_limit"


def test_a_final_answer_is_what_the_parser_says(shared: Any, prompts: Any, reads: Any) -> None:
    b, parser, _ = shared
    reads(reads=lambda _: ())
    plain = generate(b, prompts, "plain")
    parser.answer = lambda token_T: (len(token_T) // 2, len(token_T))
    try:
        got = generate(b, prompts, "answer")
    finally:
        del parser.answer
    for index, r in got.items():
        assert r.turns == 0
        assert r.tokens.tolist() == plain[index].tokens.tolist()
        for rollout, answer in ((plain[index], SegmentKind.SAMPLED), (r, SegmentKind.FINAL_ANSWER)):
            sample = to_sample(rollout, b.info, SAMPLING)
            kinds = sample.segment_kinds[sample.prompt_length :].tolist()
            half = len(kinds) // 2
            assert kinds == [SegmentKind.SAMPLED] * half + [answer] * (len(kinds) - half)


def test_an_observation_is_cut_to_the_context(shared: Any, prompts: Any, reads: Any) -> None:
    b, *_ = shared
    reads(says=lambda _: [100] * 4000)
    got = generate(b, prompts, "context")
    full = [r for r in got.values() if r.turns]
    assert full
    for r in full:
        assert r.finish_reason is FinishReason.CONTEXT
        assert len(r.prompt) + len(r.tokens) == b.info.max_context
        assert r.turns == 1


def test_weights_change_while_tools_are_busy(
    shared: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, until: Any, tmp_path: Path
) -> None:
    """Last in this file: the shared backend is another model then."""
    b, _, tools = shared
    go: list[int] = []

    async def wait() -> None:
        while not go:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(tools, "work", wait)
    iterator = b.generate(prompts[:4], SAMPLING, cohort="weights")
    until(lambda: b.stats.calling >= 2, PATIENCE_S)
    b.update_weights(make_tiny_model(tmp_path / "other", mean_length=60.0, seed=1), 1)
    assert b.stats.calling >= 2, "it did not wait for them"
    go.append(1)
    got = list(iterator)
    assert all(r.censored is None for r in got)
    answered = [r for r in got if r.turns]
    assert answered
    for r in answered:
        first = int((~r.output.sampled_T).nonzero()[0][0])
        assert set(r.output.version_T[:first].tolist()) == {0}
        after = r.output.version_T[first:][r.output.sampled_T[first:]]
        assert set(after.tolist()) <= {1}
    assert b.balance().holds


@pytest.mark.slow
def test_closed_during_a_call_it_is_observed_if_it_returns_in_time(backend: Make, prompts: Any, until: Any) -> None:
    class Slow(Memory):
        closing = False

        async def work(self) -> None:
            while not self.closing:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)

    tools = Slow()
    with backend(workers=1, episodes=Episodes(tools, Parser()), grace_s=60.0) as b:
        b.generate(prompts[:4], SAMPLING, seed=0, cohort="c")
        until(lambda: b.stats.calling >= 2, PATIENCE_S)
        tools.closing = True
    assert len(tools.done) == len(tools.ran) >= 2
    with backend(workers=1, episodes=Episodes(tools, Parser())) as b:
        got = generate(b, prompts)
        assert b.balance().holds
    assert all(r.censored is None for r in got.values())
    assert len(tools.ran) == len(set(tools.ran))
