"""What a client makes of servers that die, lie, hang, drain, refuse and are full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from crc32c import crc32c
from transformers import AutoModelForCausalLM

from rollout_wal.dataset import Provenance
from scoring.client import AsyncScoringClient, ClientOptions, ScoringClient
from scoring.client.retry import delay
from scoring.errors import (
    BadConfiguration,
    BadRequest,
    BadResult,
    DeadlinePassed,
    Overloaded,
    ScoreProvenanceMismatch,
    TeacherFailed,
    Unreachable,
)
from scoring.items import ScoreItem, Scores, Wanted
from scoring.scheduler import Limits
from scoring.teachers.hf import HfTeacherSource
from scoring.v1 import scoring_pb2 as pb

QUICK = ClientOptions(attempts=3, backoff_s=0.01, backoff_max_s=0.05, patience_s=0.5)


@pytest.fixture
def source(tiny: Callable[..., Path]) -> HfTeacherSource:
    return HfTeacherSource("t", tiny("llama", 0), precision="float32", domains=["math"])


@pytest.fixture
def other_source(tiny: Callable[..., Path]) -> HfTeacherSource:
    """The same name, other weights."""
    return HfTeacherSource("t", tiny("llama", 1), precision="float32", domains=["math"])


def items(count: int = 4, **more: Any) -> list[ScoreItem]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, 300, 20).astype(np.int32) for _ in range(count)]
    return [ScoreItem(i, (8, 20), **{"teacher": "t", "wanted": Wanted(True, 3), **more}) for i in ids]


def scored(targets: list[str], asked: list[ScoreItem], options: ClientOptions = QUICK, **more: Any) -> dict[int, Any]:
    with ScoringClient(targets, options, **more) as client:
        return dict(client.score(asked))


def flip(message: pb.ScoreResponse) -> None:
    data = bytearray(message.chunks[-1].data)
    data[0] ^= 1
    message.chunks[-1].data = bytes(data)


def unmask(message: pb.ScoreResponse) -> None:
    """A mask that hides a token, with a checksum that fits it."""
    checksum = 0
    for chunk in message.chunks:
        if chunk.kind == pb.ARRAY_KIND_VALID:
            chunk.data = b"\x00" + chunk.data[1:]
        checksum = crc32c(chunk.data, checksum)
    message.result.arrays_crc32c = checksum


def other_tokens(message: pb.ScoreResponse) -> None:
    message.result.tokens_crc32c ^= 1


def other_checkpoint(message: pb.ScoreResponse) -> None:
    message.result.provenance.checkpoint_digest = "00"


def other_request(message: pb.ScoreResponse) -> None:
    message.result.request_key = "0" * 40


def cut_short(message: pb.ScoreResponse) -> None:
    del message.chunks[1:]


def headless(message: pb.ScoreResponse) -> None:
    message.ClearField("result")


@pytest.mark.parametrize(
    ("tamper", "error", "says"),
    [
        (flip, BadResult, "checksum"),
        (unmask, BadResult, "validity mask"),
        (cut_short, BadResult, "checksum"),
        (headless, BadResult, "without saying"),
        (other_tokens, ScoreProvenanceMismatch, "checksum of the scored rollout"),
        (other_checkpoint, ScoreProvenanceMismatch, "checkpoint_digest"),
        (other_request, ScoreProvenanceMismatch, "key of the answered request"),
    ],
)
def test_a_wrong_result_is_refused_by_name_and_an_honest_server_asked(
    host: Any, front: Any, source: HfTeacherSource, tamper: Any, error: Any, says: str
) -> None:
    honest = host([source])

    async def lie(inner: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for message in inner(requests, context):
            tamper(message)
            yield message

    liar = front(honest, lie)
    for outcome in scored([liar], items()).values():
        assert isinstance(outcome, error)
        assert says in str(outcome)
    both = scored([liar, honest.target], items(), replace(QUICK, attempts=30))
    assert {outcome.server for outcome in both.values()} == {honest.target}


def test_a_stream_that_breaks_off_loses_nothing_and_doubles_nothing(
    host: Any, front: Any, source: HfTeacherSource
) -> None:
    calls = 0

    async def break_off(inner: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal calls
        calls += 1
        async for message in inner(requests, context):
            yield message
            if calls < 4:
                await context.abort(grpc.StatusCode.INTERNAL, "made to break off")

    with ScoringClient([front(host([source]), break_off)], replace(QUICK, attempts=8)) as client:
        found = [index for index, outcome in client.score(items(8)) if isinstance(outcome, Scores)]
    assert sorted(found) == list(range(8))
    assert calls >= 4


def test_only_the_same_checkpoint_may_stand_in_unless_told_otherwise(
    host: Any, source: HfTeacherSource, other_source: HfTeacherSource
) -> None:
    first, second = host([source]), host([other_source])
    targets = [first.target, second.target]
    with ScoringClient(targets, QUICK) as client:
        before = dict(client.score(items()))
        first.stop()
        after = dict(client.score(items()))
    assert {outcome.server for outcome in before.values()} == {first.target}
    for outcome in after.values():
        assert isinstance(outcome, Unreachable)
        assert first.target in str(outcome)
    pins = {"t": source.info.provenance.checkpoint}
    allowed = scored(targets, items(), replace(QUICK, other_checkpoints=True), pins=pins)
    for outcome in allowed.values():
        assert outcome.fallback
        assert outcome.provenance.checkpoint == other_source.info.provenance.checkpoint


def test_another_checkpoint_is_not_asked_while_the_right_one_is_there(
    host: Any, source: HfTeacherSource, other_source: HfTeacherSource
) -> None:
    wrong, right = host([other_source]), host([source])
    expected = Provenance("t", source.info.provenance.checkpoint)
    found = scored([wrong.target, right.target], items(12, expected=expected), replace(QUICK, other_checkpoints=True))
    assert {(outcome.server, outcome.fallback) for outcome in found.values()} == {(right.target, False)}


def test_a_teacher_that_fails_on_one_server_is_asked_for_on_another(host: Any, front: Any, source: Any) -> None:
    good = host([source])

    async def fail(inner: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for message in inner(requests, context):
            error = pb.ItemError(code=pb.ERROR_CODE_TEACHER_FAILED, message="it computes NaN")
            yield pb.ScoreResponse(item_id=message.item_id, error=error, last=True)

    bad = front(good, fail)
    found = scored([bad, good.target], items(8))
    assert {outcome.server for outcome in found.values()} == {good.target}
    for outcome in scored([bad], items()).values():
        assert isinstance(outcome, TeacherFailed)


def test_an_overloaded_server_is_left_alone_for_as_long_as_it_asks(host: Any, front: Any, source: Any) -> None:
    asked_at: list[float] = []

    async def refuse_once(inner: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for message in inner(requests, context):
            asked_at.append(time.monotonic())
            if len(asked_at) == 1:
                error = pb.ItemError(code=pb.ERROR_CODE_OVERLOADED, message="full", retry_after_seconds=0.4)
                yield pb.ScoreResponse(item_id=message.item_id, error=error, last=True)
            else:
                yield message

    (outcome,) = scored([front(host([source]), refuse_once)], items(1), replace(QUICK, patience_s=60)).values()
    assert isinstance(outcome, Scores)
    assert asked_at[1] - asked_at[0] > 0.35


def test_more_than_the_server_takes_at_once_is_all_scored(host: Any, source: HfTeacherSource) -> None:
    crowded = host([source], limits=Limits(max_queued_tokens=60))
    found = scored([crowded.target], items(40), replace(QUICK, patience_s=120))
    assert all(isinstance(outcome, Scores) for outcome in found.values())
    assert len(found) == 40


def test_patience_with_overload_ends(host: Any, front: Any, source: HfTeacherSource) -> None:
    async def full(inner: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for message in inner(requests, context):
            error = pb.ItemError(code=pb.ERROR_CODE_OVERLOADED, message="full", retry_after_seconds=0.01)
            yield pb.ScoreResponse(item_id=message.item_id, error=error, last=True)

    for outcome in scored([front(host([source]), full)], items(2)).values():
        assert isinstance(outcome, Overloaded)


@pytest.mark.parametrize("option", ["deadline", "silence"])
def test_a_server_that_hangs_is_not_waited_for_for_ever(host: Any, front: Any, source: Any, option: str) -> None:
    async def hang(inner: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            pass
        await asyncio.sleep(3600)
        yield

    target = front(host([source]), hang)
    options = replace(QUICK, timeout_s=0.3) if option == "deadline" else replace(QUICK, silence_s=0.1)
    for outcome in scored([target], items(), options).values():
        assert isinstance(outcome, DeadlinePassed if option == "deadline" else Unreachable)


def test_a_server_that_drains_gets_nothing_more(host: Any, source: HfTeacherSource) -> None:
    leaving, staying = host([source]), host([source])
    with ScoringClient([leaving.target, staying.target], QUICK) as client:
        outcomes = client.score(iter(items(300)))
        found = [next(outcomes) for _ in range(10)]
        assert leaving.drain()  # every item that it had accepted is answered
        found += list(outcomes)
    assert sorted(index for index, _ in found) == list(range(300))
    assert all(isinstance(outcome, Scores) for _, outcome in found)
    assert staying.target in {outcome.server for _, outcome in found}  # type: ignore[union-attr]


def test_a_server_that_comes_up_late_is_used(host: Any, source: HfTeacherSource) -> None:
    early, late = host([source]), host([source])
    port = late.server.port
    late.stop()
    with ScoringClient([early.target, f"127.0.0.1:{port}"], replace(QUICK, patience_s=60)) as client:
        outcomes = client.score(iter(items(200)))
        next(outcomes)
        early.stop()
        host([source], address=f"127.0.0.1:{port}")
        found = dict(outcomes)
    assert len(found) == 199
    assert all(isinstance(outcome, Scores) for outcome in found.values())


def test_wrong_tokens_and_dead_servers_are_told_apart_and_not_retried_in_vain(host: Any, source: Any) -> None:
    guarded = host([source], tokens=("right",))
    patient = replace(QUICK, attempts=1000, backoff_s=5.0)  # a retry would be a timeout of this test
    with pytest.raises(Unreachable, match="UNAUTHENTICATED"):
        scored([guarded.target], items(), replace(patient, token="wrong"))
    assert isinstance(scored([guarded.target], items(), replace(QUICK, token="right"))[0], Scores)
    guarded.stop()
    with pytest.raises(Unreachable, match="UNAVAILABLE"):
        scored([guarded.target], items(), replace(QUICK, token="right"))
    with pytest.raises(BadConfiguration, match="no_such"):
        scored([guarded.target], items(), replace(QUICK, authorities=Path("no_such.pem")))


def test_items_that_nobody_can_score_are_answered_at_once(host: Any, source: HfTeacherSource) -> None:
    asked = [*items(1), *items(1, teacher="u"), *items(1, teacher="", domain="math"), replace(items(1)[0], span=(9, 9))]
    found = scored([host([source]).target], asked, replace(QUICK, patience_s=3600))
    assert [type(found[i]) for i in range(4)] == [Scores, BadRequest, Scores, BadRequest]
    assert "'u'" in str(found[1])
    assert "span" in str(found[3])


def test_a_caller_who_does_not_take_results_stops_the_feeding(host: Any, source: HfTeacherSource) -> None:
    pulled = 0

    def source_of_items() -> Any:
        nonlocal pulled
        for item in items(400):
            pulled += 1
            yield item

    with ScoringClient([host([source]).target], replace(QUICK, window=8)) as client:
        outcomes = client.score(source_of_items())
        next(outcomes)
        last = -1
        while last != pulled:  # until nothing moves any more
            last = pulled
            time.sleep(0.3)
        assert pulled < 50
        outcomes.close()
        assert len(dict(client.score(items(3)))) == 3  # the client is whole


def test_an_error_in_the_callers_items_reaches_the_caller(host: Any, source: HfTeacherSource) -> None:
    def broken() -> Any:
        yield from items(2)
        raise OSError("the disk is gone")

    with ScoringClient([host([source]).target], QUICK) as client, pytest.raises(OSError, match="the disk is gone"):
        list(client.score(broken()))


def test_delays_grow_to_a_limit_and_half_of_each_is_random() -> None:
    options = ClientOptions(backoff_s=0.1, backoff_max_s=2.0)
    for failures in range(1, 40):
        whole = min(2.0, 0.1 * 2 ** (failures - 1))
        drawn = [delay(options, failures) for _ in range(50)]
        assert whole / 2 <= min(drawn)
        assert max(drawn) <= whole
        assert max(drawn) - min(drawn) > whole / 10


def test_a_head_is_fetched_once_checked_and_kept(
    host: Any, front: Any, source: HfTeacherSource, tiny: Any, tmp_path: Path
) -> None:
    behind = host([source])
    calls = 0
    real = type(behind.server._servicer).GetTeacherHead

    async def counted(self: Any, request: Any, context: Any) -> Any:
        nonlocal calls
        calls += 1
        async for message in real(self, request, context):
            yield message

    target = front(behind, GetTeacherHead=counted)
    weight = AutoModelForCausalLM.from_pretrained(tiny("llama", 0), dtype=torch.float32).lm_head.weight
    options = replace(QUICK, head_folder=tmp_path / "heads")

    async def fetch() -> Any:
        async with AsyncScoringClient([target], options) as client:
            head = await client.head("t")
            assert await client.head("t") is head
            with pytest.raises(ScoreProvenanceMismatch, match="checkpoint_digest"):
                await client.head("t", Provenance("t", "00"))
            with pytest.raises(BadRequest, match="'u'"):
                await client.head("u")
            return head

    head = asyncio.run(fetch())
    torch.testing.assert_close(head.tensor(), weight.detach()[: source.info.vocabulary], atol=0, rtol=0)
    assert head.provenance == source.info.provenance
    asyncio.run(fetch())
    assert calls == 1, "the second client reads the first one's folder"
    (kept,) = (tmp_path / "heads").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x7f")
    asyncio.run(fetch())
    assert calls == 2, "what is damaged on disk is fetched again"


@pytest.mark.parametrize(
    ("harm", "says"), [("nan", "NaN"), ("cut", "cut short"), ("shape", "shape"), ("flip", "checksum")]
)
def test_a_harmed_head_is_refused(host: Any, front: Any, source: HfTeacherSource, harm: str, says: str) -> None:
    behind = host([source])
    real = type(behind.server._servicer).GetTeacherHead

    async def harmed(self: Any, request: Any, context: Any) -> Any:
        checksum = 0
        async for message in real(self, request, context):
            if harm == "cut":
                message.last = False
            for chunk in message.chunks:
                if harm in ("nan", "flip") and chunk.byte_offset == 0:
                    chunk.data = np.float32("nan" if harm == "nan" else 0.5).tobytes() + chunk.data[4:]
                checksum = crc32c(chunk.data, checksum)
            if message.last and harm != "flip":
                message.arrays_crc32c = checksum
            if message.chunks and harm == "shape":
                message.chunks[0].shape[:] = message.chunks[0].shape[::-1]
            yield message

    with ScoringClient([front(behind, GetTeacherHead=harmed)], QUICK) as client, pytest.raises(BadResult, match=says):
        client.head("t")
