"""What a consumer sees of a backend to which nothing happens. One backend serves most of these tests."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from rollout_wal.backend import RolloutBackend
from rollout_wal.engines.base import FinishReason
from rollout_wal.errors import BackendError, BadInput, BadPrompt, BadSampling, CohortMismatch, UnknownRollout
from rollout_wal.params import SamplingParams

SAMPLING = SamplingParams(max_tokens=150)


def by_index(rollouts: Any) -> dict[int, list[int]]:
    return {r.index: r.tokens.tolist() for r in rollouts}


def as_index(tokens: list[list[int]]) -> dict[int, list[int]]:
    return dict(enumerate(tokens))


def use_up(backend: RolloutBackend, rollouts: list[Any]) -> None:
    backend.consumed([r.id for r in rollouts], epoch=0, step=0)


def test_the_same_tokens_as_an_engine_without_a_log(running: RolloutBackend, prompts: Any, reference: Any) -> None:
    expected = reference(prompts, SAMPLING, group_size=4, seed=11)
    rollouts = list(running.generate(prompts, SAMPLING, group_size=4, seed=11))
    assert by_index(rollouts) == as_index(expected)
    assert len(rollouts) == 32
    for r in rollouts:
        assert r.prompt.tolist() == prompts[r.index // 4]
        assert r.group == f"{r.cohort}/{r.index // 4}"
        assert r.key == f"{r.cohort}/{r.index}"
        assert r.censored is None
        assert r.output.sampled_T.all()
        assert r.output.logprob.valid_T.all()
        assert (r.output.logprob.value_T <= 0).all()
        assert (r.output.version_T == 0).all()
        ends_on_eos = r.tokens[-1] in running.info.eos_token_ids
        assert r.finish_reason is (FinishReason.EOS if ends_on_eos else FinishReason.MAX_TOKENS)
    use_up(running, rollouts)
    balance = running.balance()
    assert balance.holds
    assert balance.in_flight == 0


def test_a_named_cohort_comes_again_until_it_is_consumed(running: RolloutBackend, prompts: Any) -> None:
    first = list(running.generate(prompts, SAMPLING, cohort="named", metadata=[{"n": i} for i in range(8)]))
    assert not any(r.again for r in first)
    running.consumed([r.id for r in first[:5]], epoch=0, step=1)
    second = list(running.generate(prompts, SAMPLING, cohort="named"))
    assert {r.id for r in second} == {r.id for r in first[5:]}
    assert all(r.again for r in second)
    assert all(r.metadata == {"n": r.index} for r in second)
    with pytest.raises(CohortMismatch, match="Nothing was begun"):
        running.generate(prompts, SAMPLING, cohort="named", seed=1)
    running.consumed([r.id for r in second], epoch=0, step=2, release=False)
    assert list(running.generate(prompts, SAMPLING, cohort="named")) == []
    running.release([r.id for r in second])
    with pytest.raises(UnknownRollout):
        running.release([second[0].id])
    assert list(running.generate(prompts, SAMPLING, cohort="named")) == []


def test_unnamed_calls_are_told_apart_by_their_order(running: RolloutBackend, prompts: Any) -> None:
    first = list(running.generate(prompts, SAMPLING, seed=3))
    second = list(running.generate(prompts, SAMPLING, seed=3))
    assert {r.id for r in first}.isdisjoint(r.id for r in second)
    assert by_index(first) == by_index(second)
    use_up(running, first + second)


def test_closing_an_iterator_aborts_nothing(running: RolloutBackend, prompts: Any) -> None:
    iterator = running.generate(prompts, SAMPLING, cohort="closed", group_size=4)
    taken = [next(iterator) for _ in range(3)]
    iterator.close()  # type: ignore[attr-defined]
    everything = list(running.generate(prompts, SAMPLING, cohort="closed", group_size=4))
    assert len(everything) == 32
    assert {r.id for r in taken} <= {r.id for r in everything if r.again}
    use_up(running, everything)
    assert running.balance().in_flight == 0


def test_an_iterator_that_is_dropped_lets_go(running: RolloutBackend, prompts: Any, until: Callable[..., None]) -> None:
    """Iterated or not: what came out for it would be kept for as long as the backend lives."""
    c = running._running()
    before = c.call(lambda: len(c.handover))
    del_me = running.generate(prompts, SAMPLING, cohort="dropped")
    assert c.call(lambda: len(c.handover)) == before + 1
    del del_me
    until(lambda: c.call(lambda: len(c.handover)) == before)

    async def run() -> None:
        async def wait() -> None:
            async for _ in running.generate_async(prompts, SAMPLING, cohort="cancelled early"):
                pass

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)  # it has begun to submit, in a thread
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    until(lambda: c.call(lambda: len(c.handover)) == before)
    for cohort in ("dropped", "cancelled early"):
        use_up(running, list(running.generate(prompts, SAMPLING, cohort=cohort)))


def test_what_a_cohort_still_has(running: RolloutBackend, prompts: Any) -> None:
    assert running.members("none such") == {}
    assert running.in_flight("none such") == []
    iterator = running.generate(prompts, SAMPLING, cohort="looked at", group_size=2)
    members = running.members("looked at")
    assert sorted(members) == list(range(16))
    assert set(running.in_flight("looked at")) <= set(members.values())
    rollouts = list(iterator)
    assert running.in_flight("looked at") == []
    running.consumed([r.id for r in rollouts[:5]], epoch=0, step=0, release=False)
    running.release([rollouts[5].id])
    assert running.members("looked at") == {r.index: r.id for r in sorted(rollouts[6:], key=lambda r: r.id)}
    count = running.cohorts()["looked at"]
    assert (count.size, count.gone) == (16, 6)
    running.release([r.id for r in rollouts[:5]])
    use_up(running, rollouts[6:])
    assert running.members("looked at") == {}


def test_the_later_of_two_iterators_takes_a_cohort_over(running: RolloutBackend, prompts: Any) -> None:
    earlier = running.generate(prompts, SAMPLING, cohort="twice", group_size=4)
    later = running.generate(prompts, SAMPLING, cohort="twice", group_size=4)
    with pytest.raises(BackendError, match="asked for again"):
        list(earlier)
    everything = list(later)  # the end of the earlier one has not detached it
    assert len(everything) == 32
    use_up(running, everything)


def test_async_twin(running: RolloutBackend, prompts: Any, reference: Any) -> None:
    async def run() -> tuple[list[Any], list[Any]]:
        async def collect(seed: int) -> list[Any]:
            return [r async for r in running.generate_async(prompts, SAMPLING, seed=seed, group_size=2)]

        return await asyncio.gather(collect(21), collect(22))

    for seed, rollouts in zip((21, 22), asyncio.run(run()), strict=True):
        assert by_index(rollouts) == as_index(reference(prompts, SAMPLING, seed=seed, group_size=2))
        use_up(running, rollouts)


def test_async_twin_can_be_cancelled_while_it_waits(running: RolloutBackend, prompts: Any) -> None:
    async def run() -> None:
        async def wait() -> None:
            async for _ in running.generate_async(prompts, SAMPLING, cohort="cancelled", group_size=8):
                await asyncio.sleep(0)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())  # would not return if a thread still waited for a rollout
    rollouts = list(running.generate(prompts, SAMPLING, cohort="cancelled", group_size=8))
    assert len(rollouts) == 64
    use_up(running, rollouts)


def test_abort_delivers_what_there_was(running: RolloutBackend, prompts: Any, until: Callable[..., None]) -> None:
    sampling = SamplingParams(max_tokens=1900, ignore_eos=True)
    iterator = running.generate(prompts[:2], sampling, cohort="abort", group_size=20)
    ids = sorted(running._running().call(lambda: [r.id for r in running._running().wal.in_flight()]))
    assert len(ids) == 40
    before = running.stats.tokens
    until(lambda: running.stats.tokens > before + 200)
    for rollout in reversed(ids):  # with 32 slots, first those that wait
        running.abort(rollout, reason="deadline")
        running.abort(rollout)  # it is over: nothing happens
    rollouts = list(iterator)
    assert [r.censored for r in rollouts] == ["deadline"] * 40
    assert all(r.finish_reason is FinishReason.RUNNING for r in rollouts)
    assert sum(len(r.output) for r in rollouts) > 200
    assert sum(len(r.output) == 0 for r in rollouts) >= 8
    balance = running.balance()
    assert balance.holds
    assert balance.censored["deadline"] == 40
    # Tokens of them may still be on their way when they are forgotten.
    use_up(running, rollouts)
    following = list(running.generate(prompts, SAMPLING, seed=5))
    assert len(following) == 8
    use_up(running, following)
    with pytest.raises(UnknownRollout):
        running.abort(ids[0])


def test_stop_strings_cut_exactly(running: RolloutBackend, prompts: Any, reference: Any, model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    full = reference(prompts, SAMPLING, group_size=4, seed=31)
    letters = tokenizer.decode(full[0])[40:42] or "a"
    stop = (letters, "e", "42")
    sampling = SamplingParams(max_tokens=150, stop=stop, min_tokens=5)

    def cut(tokens: list[int]) -> int | None:
        """Decode every prefix, whole."""
        before = tokenizer.decode(tokens[:4], skip_special_tokens=False)
        for count in range(5, len(tokens) + 1):
            text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
            same = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
            if any(text.find(s, max(0, same - len(s) + 1)) >= 0 for s in stop):
                return count
            before = text
        return None

    # Without end of sequence before min_tokens the draws are others: ask the engine again, without the strings.
    full = reference(prompts, SamplingParams(max_tokens=150, min_tokens=5), group_size=4, seed=31)
    rollouts = list(running.generate(prompts, sampling, group_size=4, seed=31))
    stopped = 0
    for r in rollouts:
        count = cut(full[r.index])
        assert r.tokens.tolist() == full[r.index][:count]
        assert (r.finish_reason is FinishReason.STOP_STRING) == (count is not None)
        stopped += count is not None
    assert stopped > 10
    use_up(running, rollouts)


def test_stop_tokens_limits_and_context(running: RolloutBackend, prompts: Any, reference: Any) -> None:
    common = np.bincount(np.concatenate(reference(prompts, SAMPLING, seed=41))).argsort()[-9:]
    sampling = SamplingParams(max_tokens=60, min_tokens=8, stop_token_ids=tuple(common.tolist()))
    rollouts = list(running.generate(prompts, sampling, seed=41))
    assert by_index(rollouts) == as_index(reference(prompts, sampling, seed=41))
    for r in rollouts:
        assert 8 <= len(r.tokens) <= 60
        assert not np.isin(r.tokens[7:-1], common).any()
    assert any(r.finish_reason is FinishReason.STOP_TOKEN for r in rollouts)
    use_up(running, rollouts)
    long = [[5] * (running.info.max_context - 10)]
    (r,) = running.generate(long, SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(r.tokens), r.finish_reason) == (10, FinishReason.CONTEXT)
    use_up(running, [r])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "empty"), ([1, 100_000], "out of the vocabulary"), ([1, -1], "out of the"), ([1] * 5000, "leaves no room")],
)
def test_bad_prompts_are_refused_whole(running: RolloutBackend, prompts: Any, prompt: Any, words: str) -> None:
    before = running.balance()
    with pytest.raises(BadPrompt, match=words):
        running.generate([*prompts, prompt], SAMPLING)
    assert running.balance() == before


def test_other_bad_calls_are_refused_whole(running: RolloutBackend, prompts: Any) -> None:
    before = running.balance()
    with pytest.raises(BadInput, match="metadata"):
        running.generate(prompts, SAMPLING, metadata=[{"f": object()}] * 8)
    with pytest.raises(BadInput, match="metadata entries"):
        running.generate(prompts, SAMPLING, metadata=[{}])
    with pytest.raises(BadInput, match="0 prompts"):
        running.generate([], SAMPLING)
    with pytest.raises(BadInput, match="group_size 0"):
        running.generate(prompts, SAMPLING, group_size=0)
    with pytest.raises(BadInput, match="64 bits"):
        running.generate(prompts, SAMPLING, seed=1 << 64)
    with pytest.raises(BadInput, match="noise='never'"):
        running.generate(prompts, SAMPLING, noise="never")  # type: ignore[arg-type]
    with pytest.raises(UnknownRollout, match="rollout 999999 is not in the log"):
        running.consumed([999999], epoch=0, step=0)
    with pytest.raises(BadInput, match="no worker '7'"):
        running.kill_worker("7")
    assert running.balance() == before


def test_what_was_not_delivered_cannot_be_consumed(running: RolloutBackend, prompts: Any) -> None:
    iterator = running.generate(prompts, SamplingParams(max_tokens=1500, ignore_eos=True), cohort="early")
    c = running._running()
    ids = c.call(lambda: [r.id for r in c.wal.in_flight()])
    with pytest.raises(BadInput, match="was not delivered"):
        running.consumed(ids[:1], epoch=0, step=0)
    with pytest.raises(BadInput, match="was not delivered"):
        running.release(ids[:1])
    for rollout in ids:
        running.abort(rollout)
    use_up(running, list(iterator))


def test_an_exception_in_a_command_reaches_its_caller_alone(running: RolloutBackend, prompts: Any) -> None:
    def fail() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        running._running().call(fail)
    rollouts = list(running.generate(prompts, SAMPLING, seed=51))
    assert len(rollouts) == 8
    use_up(running, rollouts)


def test_without_a_seed_every_cohort_has_noise_of_its_own(
    running: RolloutBackend, prompts: Any, reference: Any
) -> None:
    asked = {name: list(running.generate(prompts, SAMPLING, cohort=name)) for name in ("noise-0", "noise-1")}
    for name, rollouts in asked.items():
        assert by_index(rollouts) == as_index(reference(prompts, SAMPLING, cohort=name))
    assert by_index(asked["noise-0"]) != by_index(asked["noise-1"])
    unnamed = [list(running.generate(prompts[:3], SAMPLING)) for _ in range(2)]
    assert by_index(unnamed[0]) != by_index(unnamed[1])
    for rollouts in (*asked.values(), *unnamed):
        use_up(running, rollouts)


def test_progress_bar(running: RolloutBackend, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a long number would push the last column out of a narrow screen
    screen = io.StringIO()
    with redirect_stderr(screen):
        rollouts = list(running.generate(prompts, SAMPLING, seed=61, progress=True))
    for words in ("8/8", "tok/s", "in flight", "resumed", "durable lag"):
        assert words in screen.getvalue()
    use_up(running, rollouts)


def test_metadata_comes_out_as_it_would_from_the_log(running: RolloutBackend, prompts: Any) -> None:
    rollouts = list(running.generate(prompts[:1], SAMPLING, metadata=[{"pair": (1, 2), 3: b"x"}], seed=71))
    assert rollouts[0].metadata == {"pair": [1, 2], 3: b"x"}
    use_up(running, rollouts)


def test_stop_strings_need_a_tokenizer(model: Path, tmp_path: Path, prompts: Any) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    with RolloutBackend(bare, tmp_path / "wal", segment_bytes=1 << 18) as backend:
        with pytest.raises(BadSampling, match="stop strings need a tokenizer"):
            backend.generate(prompts, SamplingParams(stop=("x",)))
        assert len(list(backend.generate(prompts, SAMPLING))) == 8
    with pytest.raises(BadInput, match="not running"):
        backend.balance()
