"""The server on loopback, met by clients that behave and by clients that do not."""

from __future__ import annotations

import asyncio
import io
import logging
import shutil
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scoring import auth, wire
from scoring.cache import ScoreCache
from scoring.errors import BadConfiguration
from scoring.items import Ragged, ScoreItem, Scores, Wanted
from scoring.load_generator import generate_load
from scoring.residency import Residency
from scoring.scheduler import Limits, Scheduler
from scoring.server import MESSAGE_BYTES_MAX, ScoringServer, ServerOptions, serve
from scoring.testing import PlainSource, expected_logprobs, plain_item
from scoring.v1 import scoring_pb2 as pb
from scoring.v1 import scoring_pb2_grpc as pb_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def with_server(
    sources: list[PlainSource],
    work: Callable[[ScoringServer, Any], Coroutine[Any, Any, None]],
    *,
    limits: Limits | None = None,
    cache: ScoreCache | None = None,
    **options: Any,
) -> None:
    """work(server, insecure channel), on a server that runs meanwhile."""

    async def run() -> None:
        residency = Residency({s.info.id: s.info.nbytes for s in sources}, 1000)
        scheduler = Scheduler(sources, residency, limits=limits, cache=cache)
        server = await serve(scheduler, ServerOptions(**options))
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                await work(server, channel)
        finally:
            for source in sources:
                source.gate.set()
            await server.stop(0)

    asyncio.run(run())


def stub(channel: Any) -> Any:
    return pb_grpc.TeacherScoringServiceStub(channel)


async def send(items: list[ScoreItem]) -> AsyncIterator[pb.ScoreRequest]:
    for i, item in enumerate(items):
        for message in wire.item_messages(str(i), item):
            yield message


async def answers(call: Any) -> dict[str, Any]:
    """Scores, or error code, by item."""
    out: dict[str, Any] = {}
    open_results: dict[str, Any] = {}
    async for message in call:
        if message.HasField("error"):
            assert message.error.message
            out[message.item_id] = message.error.code
            continue
        if message.HasField("result"):
            open_results[message.item_id] = message.result, wire.result_assembler(1 << 30)
        header, assembler = open_results[message.item_id]
        assembler.add(message.chunks)
        if message.last:
            out[message.item_id] = wire.read_result(header, assembler)
    return out


def check(item: ScoreItem, scores: Any) -> None:
    assert isinstance(scores, Scores), scores
    scores.check_against(item)
    np.testing.assert_array_equal(scores.logprobs, expected_logprobs(item))


async def works(channel: Any, seed: int = 77) -> None:
    """The server still scores."""
    found = await answers(stub(channel).Score(send([plain_item(seed)])))
    check(plain_item(seed), found["0"])


async def status_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    code: grpc.StatusCode = error.value.code()
    return code


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, other-ca; good and expired, both of ca; stranger, of other-ca."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("certificates")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "rsa:2048", "-nodes")
    for ca in ("ca", "other-ca"):
        run("req", "-x509", *new_key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-days", "30", "-subj", f"/CN={ca}")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name, ca, days in (("good", "ca", "30"), ("expired", "ca", "-1"), ("stranger", "other-ca", "30")):
        run("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial"),
            *("-out", f"{name}.pem", "-days", days, "-extfile", "names"),
        )
    return folder


def tls(folder: Path, authority: str = "ca", own: str = "") -> Any:
    files = [
        (folder / name).read_bytes() for name in (f"{authority}.pem", f"{own}.key", f"{own}.pem") if own or "ca" in name
    ]
    return grpc.ssl_channel_credentials(*files)


async def reaches(port: int, credentials: Any) -> bool:
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        try:
            await stub(channel).ListTeachers(pb.ListTeachersRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017
            return False
        return True


def test_tls_and_mtls_let_in_whom_they_should(certificates: Path) -> None:
    good = {"certificate": certificates / "good.pem", "private_key": certificates / "good.key"}

    async def plain_tls(server: ScoringServer, insecure: Any) -> None:
        assert await reaches(server.port, tls(certificates))
        assert not await reaches(server.port, tls(certificates, "other-ca"))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub(insecure).ListTeachers(pb.ListTeachersRequest(), timeout=10)

    with_server([PlainSource("a")], plain_tls, **good)

    async def mutual(server: ScoringServer, _: Any) -> None:
        assert await reaches(server.port, tls(certificates, own="good"))
        for own in ("", "expired", "stranger"):
            assert not await reaches(server.port, tls(certificates, own=own)), own

    with_server([PlainSource("a")], mutual, **good, client_authorities=certificates / "ca.pem")

    async def expired(server: ScoringServer, _: Any) -> None:
        assert not await reaches(server.port, tls(certificates))

    with_server(
        [PlainSource("a")], expired, certificate=certificates / "expired.pem", private_key=certificates / "expired.key"
    )


def test_certificates_that_do_not_belong_together_stop_the_start(certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_text("rubbish")
    for certificate, key, authorities in (
        (certificates / "good.pem", certificates / "expired.key", None),
        (certificates / "good.pem", certificates / "absent.key", None),
        (tmp_path / "rubbish", certificates / "good.key", None),
        (certificates / "good.pem", certificates / "good.key", tmp_path / "rubbish"),
    ):
        with pytest.raises(BadConfiguration, match="did not start"):
            auth.server_credentials(certificate, key, authorities)


def test_only_a_right_token_gets_in() -> None:
    tokens = ("first-token-of-32-characters-long", "second-token-of-32-characters-lo")

    async def work(server: ScoringServer, channel: Any) -> None:
        for shown in (
            "",
            "Bearer ",
            tokens[0],
            f"Bearer {tokens[0][:-1]}",
            f"Bearer {tokens[0]}x",
            f"bearer {tokens[0]}",
        ):
            metadata = (("authorization", shown),) if shown else ()
            call = stub(channel).Score(send([plain_item(1)]), metadata=metadata)
            assert await status_of(call) == grpc.StatusCode.UNAUTHENTICATED, shown
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await stub(channel).ListTeachers(pb.ListTeachersRequest(), metadata=metadata)
        assert server.scheduler.counters.refused_token == 12
        assert server.scheduler.counters.accepted_items == 0
        for token in tokens:
            call = stub(channel).Score(send([plain_item(1)]), metadata=(("authorization", f"Bearer {token}"),))
            check(plain_item(1), (await answers(call))["0"])
        probe = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert probe.status == SERVING, "probes carry no token"

    with_server([PlainSource("a")], work, tokens=tokens)


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# of the trainers\n0123456789abcdef\n\n  fedcba9876543210  \n")
    assert auth.read_tokens(path) == ("0123456789abcdef", "fedcba9876543210")
    for text in ("", "# nothing\n", "short\n", "0123456789abcdéf\n"):
        path.write_text(text)
        with pytest.raises(BadConfiguration):
            auth.read_tokens(path)
    with pytest.raises(BadConfiguration):
        auth.read_tokens(tmp_path / "absent")


def test_health_of_the_server_and_of_each_teacher(caplog: pytest.LogCaptureFixture) -> None:
    async def work(server: ScoringServer, channel: Any) -> None:
        health = health_pb2_grpc.HealthStub(channel)

        async def of(service: str) -> Any:
            return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

        for service in ("", "scoring.v1.TeacherScoringService", "teacher/good", "teacher/bad"):
            assert await of(service) == SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await of("teacher/nobody")
        found = await answers(stub(channel).Score(send([plain_item(1, "good"), plain_item(1, "bad")])))
        check(plain_item(1, "good"), found["0"])
        assert found["1"] == pb.ERROR_CODE_TEACHER_FAILED
        async with asyncio.timeout(10):
            while await of("teacher/bad") == SERVING:
                await asyncio.sleep(0.02)
        assert await of("teacher/good") == await of("") == SERVING
        listed = await stub(channel).ListTeachers(pb.ListTeachersRequest())
        assert {t.provenance.teacher: bool(t.failure) for t in listed.teachers} == {"good": False, "bad": True}
        assert {t.provenance.teacher: t.resident for t in listed.teachers} == {"good": True, "bad": False}

    with caplog.at_level(logging.CRITICAL):
        with_server([PlainSource("good"), PlainSource("bad", fail=OSError("gone"))], work)


def test_a_broken_scheduler_fails_health_and_every_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(server: ScoringServer, channel: Any) -> None:
        call = stub(channel).Score(send([plain_item(1), plain_item(2)]))
        await until(lambda: server.scheduler.busy is not None)

        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(server.scheduler.residency, "plan", broken)
        queued = stub(channel).Score(send([plain_item(3)]))
        await until(lambda: server.scheduler.counters.accepted_items == 3)
        source.gate.set()
        assert await status_of(queued) == grpc.StatusCode.UNAVAILABLE
        assert set(await answers(call)) == {"0", "1"}
        await asyncio.wait_for(server.wait(), 10)
        assert await status_of(stub(channel).Score(send([plain_item(4)]))) == grpc.StatusCode.UNAVAILABLE
        health = health_pb2_grpc.HealthStub(channel)
        async with asyncio.timeout(10):
            while (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING:
                await asyncio.sleep(0.02)

    with caplog.at_level(logging.CRITICAL + 1):
        with_server([source], work)


def test_draining_answers_all_that_was_accepted_and_nothing_more() -> None:
    source = PlainSource("a")
    source.gate.clear()
    items = [plain_item(i) for i in range(20)]

    async def work(server: ScoringServer, channel: Any) -> None:
        late = asyncio.Event()

        async def requests() -> AsyncIterator[pb.ScoreRequest]:
            async for message in send(items):
                yield message
            await late.wait()
            for message in wire.item_messages("late", plain_item(99)):
                yield message
            await asyncio.Event().wait()  # and the client never says that it is done

        call = stub(channel).Score(requests())
        found = asyncio.create_task(answers(call))
        await until(lambda: server.open_items == 20)
        drained = asyncio.create_task(server.drain(20.0))
        await until(lambda: server.draining)
        late.set()
        await until(lambda: server.scheduler.counters.refused_draining == 1)
        source.gate.set()
        assert await drained
        outcomes = await asyncio.wait_for(found, 10)
        assert await call.code() == grpc.StatusCode.OK
        assert outcomes.pop("late") == pb.ERROR_CODE_DRAINING
        for i, item in enumerate(items):
            check(item, outcomes[str(i)])

    with_server([source], work)


def test_a_drain_does_not_wait_for_ever_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    source = PlainSource("a")
    item = plain_item(1, length=90_000)

    async def work(server: ScoringServer, channel: Any) -> None:
        call = stub(channel).Score(send([item] * 30))
        await until(lambda: server.scheduler.counters.scored_items == 1)
        assert not await server.drain(0.3)
        call.cancel()

    with_server([source], work, cache=ScoreCache(tmp_path))
    assert len(list(tmp_path.glob("??/*"))) == 1, "what was computed is kept"


def test_a_client_that_does_not_read_is_not_read_and_in_the_end_sent_away() -> None:
    """Its results are 360 kB each: the windows of the transport hold a few of them."""
    items = [plain_item(i, length=90_000) for i in range(60)]
    source = PlainSource("a")

    async def work(server: ScoringServer, channel: Any) -> None:
        call = stub(channel).Score(send(items))
        await until(lambda: server.scheduler.counters.scored_items > 0)
        # Another client is not affected meanwhile.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as other:
            await works(other)
            await until(lambda: server.scheduler.counters.stalled_streams == 1)
            await until(lambda: not server.open_streams)
            assert server.scheduler.counters.accepted_items < 40
            assert server.result_bytes == 0
            assert server.scheduler.queued_tokens == 0
            await works(other, 78)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:  # what was under way, then the end
                pass

    with_server([source], work, stream_items=8, stall_s=1.0)


def test_a_client_that_leaves_an_item_unfinished_is_sent_away() -> None:
    async def work(server: ScoringServer, channel: Any) -> None:
        async def half() -> AsyncIterator[pb.ScoreRequest]:
            message = next(wire.item_messages("x", plain_item(1)))
            message.last = False
            yield message
            await asyncio.Event().wait()

        call = stub(channel).Score(half())
        assert await status_of(call) == grpc.StatusCode.ABORTED
        assert server.scheduler.counters.stalled_streams == 1
        await works(channel)

    with_server([PlainSource("a")], work, stall_s=0.5)


def test_what_a_client_asked_for_that_vanished_is_not_computed() -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(server: ScoringServer, channel: Any) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as other:
            call = stub(other).Score(send([plain_item(i) for i in range(50)]))
            await until(lambda: server.open_items == 50)
            call.cancel()
        await until(lambda: not server.open_streams)
        source.gate.set()
        await until(lambda: not server.scheduler.queued_tokens)
        assert len(source.scored) <= 1
        assert server.result_bytes == 0
        await works(channel)

    with_server([source], work)


def test_too_much_and_too_large_are_told_apart() -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(server: ScoringServer, channel: Any) -> None:
        first = stub(channel).Score(send([plain_item(i) for i in range(4)]))
        await until(lambda: server.scheduler.queued_tokens == 48)
        found = {}
        call = stub(channel).Score(send([plain_item(5), plain_item(6, length=101)]))
        async for message in call:
            found[message.item_id] = message.error
        assert found["0"].code == pb.ERROR_CODE_OVERLOADED
        assert 0 < found["0"].retry_after_seconds <= 60
        assert found["1"].code == pb.ERROR_CODE_TOO_LARGE
        source.gate.set()
        assert len(await answers(first)) == 4

        async def huge() -> AsyncIterator[pb.ScoreRequest]:
            chunk = pb.ArrayChunk(kind=pb.ARRAY_KIND_TOKEN_IDS, data=bytes(MESSAGE_BYTES_MAX))
            yield pb.ScoreRequest(item_id="x", item=pb.ScoreItem(), chunks=[chunk])

        with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as error:
            async for _ in stub(channel).Score(huge()):
                pass
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await works(channel)

    with_server([source], work, limits=Limits(max_queued_tokens=48, max_item_tokens=100))


def test_results_that_are_not_taken_count_as_load() -> None:
    source = PlainSource("a")
    source.gate.clear()
    size = plain_item(0).result_bytes(8)

    async def work(server: ScoringServer, channel: Any) -> None:
        first = stub(channel).Score(send([plain_item(i) for i in range(3)]))
        await until(lambda: server.open_items == 3)
        assert server.result_bytes == 3 * size
        assert (await answers(stub(channel).Score(send([plain_item(9)]))))["0"] == pb.ERROR_CODE_OVERLOADED
        source.gate.set()
        assert len(await answers(first)) == 3
        assert server.result_bytes == 0

    with_server([source], work, result_bytes=3 * size)


def test_items_that_would_take_all_memory_are_refused_before_it_is_taken() -> None:
    tokens = np.zeros(1000, np.int32)
    offsets = np.zeros(1000, np.int64)
    offsets[1:] = 10_000
    items = [
        ScoreItem(tokens, (1, 1000), "a", candidates=Ragged(np.zeros(10_000, np.int32), offsets)),
        ScoreItem(tokens, (1, 1000), "a", wanted=Wanted(top_k=2**31)),
        ScoreItem(tokens, (1, 1000), "a", wanted=Wanted(top_k=1000)),
        ScoreItem(tokens, (1, 1000), "a", temperature=1e-300),
        ScoreItem(tokens + 1000, (1, 1000), "a"),
        ScoreItem(tokens, (1, 1000), "nobody"),
        plain_item(1),
    ]

    async def work(server: ScoringServer, channel: Any) -> None:
        found = await answers(stub(channel).Score(send(items)))
        large, bad = pb.ERROR_CODE_TOO_LARGE, pb.ERROR_CODE_BAD_REQUEST
        assert [found[str(i)] for i in range(6)] == [large, large, large, bad, bad, bad]
        check(items[6], found["6"])

    with_server([PlainSource("a")], work, limits=Limits(max_item_result_bytes=1 << 20))


def test_ten_times_too_much_load_loses_nothing_and_holds_little() -> None:
    """Ten times what the server takes on arrives at once; what is refused comes again, until all is answered."""
    source = PlainSource("a")
    items = [plain_item(i) for i in range(400)]
    most = 0

    async def work(server: ScoringServer, _: Any) -> None:
        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, server.scheduler.queued_tokens)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        report = await generate_load(f"127.0.0.1:{server.port}", items, 4000.0)
        watching.cancel()
        assert not report.failures
        for index, item in enumerate(items):
            check(item, report.answers[index])
        assert server.scheduler.counters.refused_overload > 0
        assert most <= 40 * 12
        assert len(source.scored) == len(items), "each of them once"

    with_server([source], work, limits=Limits(max_queued_tokens=40 * 12, linger_s=0.05))


def test_the_load_generator_stays_on_this_machine() -> None:
    for target in ("192.0.2.1:50151", "[2001:db8::1]:50151"):
        with pytest.raises(BadConfiguration):
            asyncio.run(generate_load(target, [plain_item(1)], 1.0))


MESSAGES = st.lists(
    st.builds(
        pb.ScoreRequest,
        item_id=st.sampled_from(["", "x", "y", "x" * 300]),
        item=st.none()
        | st.builds(
            pb.ScoreItem,
            teacher=st.sampled_from(["a", "", "../../etc/passwd"]),
            domain=st.sampled_from(["", "math"]),
            span_start=st.integers(0, 5) | st.just(2**32 - 1),
            span_end=st.integers(0, 20) | st.just(2**32 - 1),
            temperature=st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-310]),
            wanted=st.builds(pb.Wanted, logprobs=st.booleans(), top_k=st.sampled_from([0, 3, 2**32 - 1])),
            tokens_crc32c=st.just(0),
            deadline_ms=st.sampled_from([0, 1, 2**32 - 1]),
        ),
        chunks=st.lists(
            st.builds(
                pb.ArrayChunk,
                kind=st.integers(0, 30),
                dtype=st.integers(0, 6),
                shape=st.lists(st.sampled_from([0, 1, 4, 2**63, 2**64 - 1]), max_size=3),
                offsets=st.binary(max_size=24),
                byte_offset=st.sampled_from([0, 1, 2**64 - 1]),
                data=st.binary(max_size=32),
            ),
            max_size=3,
        ),
        last=st.booleans(),
    ).map(lambda message: message.SerializeToString())
    | st.binary(max_size=60),
    min_size=1,
    max_size=5,
)


def test_whatever_bytes_arrive_the_server_answers_or_refuses_and_goes_on() -> None:
    async def work(server: ScoringServer, channel: Any) -> None:
        call_with_bytes = channel.stream_stream("/scoring.v1.TeacherScoringService/Score")
        tried = 0

        async def attack(messages: list[bytes]) -> None:
            call = call_with_bytes(iter(messages), timeout=10)
            codes = []
            try:
                async for raw in call:
                    response = pb.ScoreResponse.FromString(raw)
                    codes.append(response.error.code)
                    assert response.HasField("error"), "nothing that was sent is a whole item"
            except grpc.aio.AioRpcError as error:
                # Where the server ended the call while this was still sending, gRPC's client may report its own failure
                # to send instead of the status.
                late = error.code() == grpc.StatusCode.INTERNAL and "execute_batch" in (
                    error.debug_error_string() or ""
                )
                assert late or error.code() == grpc.StatusCode.INVALID_ARGUMENT, error  # noqa: PT017

        loop = asyncio.get_running_loop()

        @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(messages=MESSAGES)
        def run(messages: list[bytes]) -> None:
            nonlocal tried
            tried += 1
            asyncio.run_coroutine_threadsafe(attack(messages), loop).result(30)

        await asyncio.to_thread(run)
        assert tried >= 50
        assert not server.open_streams
        assert server.result_bytes == 0
        assert server.scheduler.queued_tokens == 0
        await works(channel)

    logging.disable(logging.ERROR)  # gRPC logs what it cannot parse
    try:
        with_server([PlainSource("a")], work)
    finally:
        logging.disable(logging.NOTSET)


def test_more_calls_than_allowed_are_refused() -> None:
    source = PlainSource("a")
    source.gate.clear()

    async def work(server: ScoringServer, channel: Any) -> None:
        calls = [stub(channel).Score(send([plain_item(i)])) for i in range(3)]
        await until(lambda: server.open_items == 3)
        own = [("grpc.use_local_subchannel_pool", 1)]  # on one connection, the client itself waits
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=own) as other:
            with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
                await stub(other).ListTeachers(pb.ListTeachersRequest(), timeout=10)
        source.gate.set()
        for call in calls:
            await answers(call)
        await works(channel)

    with_server([source], work, calls=3)


def test_heads_come_whole_or_not_at_all() -> None:
    async def work(server: ScoringServer, channel: Any) -> None:
        async def fetch(**fields: Any) -> tuple[Any, Any]:
            assembler = wire.Assembler({pb.ARRAY_KIND_HEAD_WEIGHT: ("head", pb.DTYPE_FLOAT32, 2)}, 1 << 20)
            last = None
            async for message in stub(channel).GetTeacherHead(pb.GetTeacherHeadRequest(**fields)):
                assembler.add(message.chunks)
                last = message
            return assembler, last

        assembler, last = await fetch(teacher="a")
        assert last.last
        assert last.arrays_crc32c == assembler.crc32c
        np.testing.assert_array_equal(assembler.arrays()["head"], np.arange(80).reshape(10, 8))
        with pytest.raises(grpc.aio.AioRpcError, match="FAILED_PRECONDITION"):
            await fetch(teacher="a", expected=pb.Provenance(checkpoint_digest="other"))
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await fetch(teacher="nobody")
        stored = await server.scheduler.head("a")
        raw = bytearray(stored.path.read_bytes())
        raw[-5] ^= 1
        stored.path.write_bytes(raw)
        with pytest.raises(grpc.aio.AioRpcError, match="damaged"):
            await fetch(teacher="a")
        assembler, last = await fetch(teacher="a")  # made anew
        np.testing.assert_array_equal(assembler.arrays()["head"], np.arange(80).reshape(10, 8))

    with_server([PlainSource("a")], work)


def test_reflection_only_if_asked_for() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def ask(channel: Any) -> list[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        return [s.name async for answer in call for s in answer.list_services_response.service]

    async def on(_: ScoringServer, channel: Any) -> None:
        assert "scoring.v1.TeacherScoringService" in await ask(channel)

    async def off(_: ScoringServer, channel: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await ask(channel)

    with_server([PlainSource("a")], on, reflection=True)
    with_server([PlainSource("a")], off)


def test_metrics_over_http() -> None:
    pytest.importorskip("prometheus_client", reason="metrics are optional")
    from scoring.metrics import expose

    async def work(server: ScoringServer, channel: Any) -> None:
        http = expose(server, "127.0.0.1", 0)
        try:
            await works(channel)
            await answers(stub(channel).Score(send([plain_item(1, "nobody")])))
            url = f"http://127.0.0.1:{http.server_port}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
        finally:
            await asyncio.to_thread(http.shutdown)
            http.server_close()
        lines = set(text.splitlines())
        for line in (
            "scoring_scored_items_total 1.0",
            "scoring_scored_tokens_total 12.0",
            'scoring_teacher_loads_total{teacher="a"} 1.0',
            'scoring_teacher_resident{teacher="a"} 1.0',
            "scoring_healthy 1.0",
            "scoring_open_items 0.0",
            "scoring_answered_seconds_count 1.0",
            'scoring_answered_seconds_bucket{le="+Inf"} 1.0',
        ):
            assert line in lines, text

    with_server([PlainSource("a")], work)


def test_an_address_in_use_stops_the_start() -> None:
    async def work(server: ScoringServer, _: Any) -> None:
        other = Scheduler([PlainSource("a")], Residency({"a": 1}, 1))
        with pytest.raises(BadConfiguration, match="cannot listen"):
            await serve(other, ServerOptions(address=f"127.0.0.1:{server.port}"))

    with_server([PlainSource("a")], work)


def test_the_table_in_the_terminal_shows_the_work() -> None:
    from rich.console import Console

    from scoring.progress import Progress

    async def work(server: ScoringServer, channel: Any) -> None:
        await works(channel)
        out = io.StringIO()
        console = Console(file=out, width=160)
        console.print(Progress(server, console).render())
        text = out.getvalue()
        assert "in memory" in text
        assert "1 scored" in text

    with_server([PlainSource("a")], work)
