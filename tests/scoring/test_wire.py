"""Items and results over the wire: nothing changes on the way, and nothing damaged gets through."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_wal.dataset import Provenance, tokens_crc32c
from scoring import wire
from scoring.errors import BadRequest, BadResult, ScoreProvenanceMismatch, ScoringError
from scoring.items import Ragged, ScoreItem, Scores, Wanted
from scoring.v1 import scoring_pb2 as pb

REPOSITORY = Path(__file__).parents[2]
WHO = Provenance("math", "c" * 32, "d" * 32, "e" * 32, "float32")


def make_item(seed: int = 0, length: int = 40, start: int = 10) -> ScoreItem:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1000, length).astype(np.int32)
    counts = rng.integers(0, 4, length - start)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    candidates = Ragged(rng.integers(0, 1000, offsets[-1]).astype(np.int32), offsets)
    prefix = rng.integers(0, 1000, 7).astype(np.int32)
    return ScoreItem(
        tokens, (start, length), "math", "", prefix, 0.7, Wanted(True, 4, True, True), candidates, WHO, 2.5
    )


def make_scores(item: ScoreItem) -> Scores:
    rng = np.random.default_rng(1)
    rows, offsets = item.positions, item.candidates.offsets  # type: ignore[union-attr]
    numbers = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return Scores(
        item.span,
        WHO,
        tokens_crc32c(item.token_ids),
        tokens_crc32c(item.read_ids()),
        item.key(WHO),
        np.ones(rows, bool),
        numbers(rows),
        rng.integers(0, 1000, (rows, 4)).astype(np.int32),
        numbers(rows, 4),
        numbers(rows),
        numbers(rows),
        Ragged(numbers(offsets[-1]), offsets),
        rng.integers(0, 0x4000, (rows, 16)).astype(np.uint16),
    )


def carry_item(item: ScoreItem, chunk_bytes: int) -> ScoreItem:
    messages = [pb.ScoreRequest.FromString(m.SerializeToString()) for m in wire.item_messages("x", item, chunk_bytes)]
    assert [m.last for m in messages] == [False] * (len(messages) - 1) + [True]
    assembler = wire.item_assembler(1 << 20)
    for message in messages:
        assembler.add(message.chunks)
    return wire.read_item(messages[0].item, assembler)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(2, 60), chunk_bytes=st.integers(9, 600), data=st.data())
def test_items_arrive_as_they_were(seed: int, length: int, chunk_bytes: int, data: st.DataObject) -> None:
    item = make_item(seed, length, data.draw(st.integers(0, length - 1)))
    there = carry_item(item, chunk_bytes)
    assert there.key(WHO) == item.key(WHO)
    np.testing.assert_array_equal(there.token_ids, item.token_ids)
    assert (there.span, there.temperature, there.wanted, there.expected, there.deadline_s) == (
        item.span, item.temperature, item.wanted, item.expected, item.deadline_s,
    )  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [64, 1000, wire.CHUNK_BYTES])
def test_results_arrive_as_they_were(chunk_bytes: int) -> None:
    item = make_item()
    scores = make_scores(item)
    messages = list(wire.result_messages("x", scores, chunk_bytes))
    assert all(sum(len(c.data) for c in m.chunks) <= chunk_bytes for m in messages)
    assembler = wire.result_assembler(1 << 20)
    for message in messages:
        assembler.add(pb.ScoreResponse.FromString(message.SerializeToString()).chunks)
    there = wire.read_result(messages[0].result, assembler)
    there.check_against(item)
    for name in ("valid", "logprobs", "top_ids", "top_logprobs", "tail_mass", "entropy", "hidden_states"):
        np.testing.assert_array_equal(getattr(there, name), getattr(scores, name))
    np.testing.assert_array_equal(there.candidate_logprobs.values, scores.candidate_logprobs.values)  # type: ignore[union-attr]


def test_every_flipped_bit_of_an_array_is_noticed() -> None:
    item = make_item(length=14)
    (message,) = wire.result_messages("x", make_scores(item))
    for index, chunk in enumerate(message.chunks):
        for at in range(len(chunk.data)):
            damaged = pb.ScoreResponse.FromString(message.SerializeToString())
            data = bytearray(chunk.data)
            data[at] ^= 4
            damaged.chunks[index].data = bytes(data)
            assembler = wire.result_assembler(1 << 20)
            assembler.add(damaged.chunks)
            with pytest.raises(BadResult):
                wire.read_result(damaged.result, assembler)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([*range(20), 99]),
    dtype=st.integers(0, 7),
    shape=st.lists(st.sampled_from([0, 1, 5, 2**31, 2**63, 2**64 - 1]), max_size=3),
    offsets=st.binary(max_size=40),
    at=st.sampled_from([0, 1, 2**63]),
    data=st.binary(max_size=40),
)
def test_whatever_a_chunk_says_it_is_read_or_refused(
    kind: int, dtype: int, shape: list[int], offsets: bytes, at: int, data: bytes
) -> None:
    chunk = pb.ArrayChunk(kind=kind, dtype=dtype, shape=shape, offsets=offsets, byte_offset=at, data=data)
    for assembler in (wire.item_assembler(64), wire.result_assembler(64)):
        try:
            assembler.add([chunk])
            for array in assembler.arrays().values():
                assert (array.values if isinstance(array, Ragged) else array).nbytes <= 64
        except ScoringError:
            pass


def test_limits_and_order() -> None:
    message = next(wire.item_messages("x", make_item()))
    with pytest.raises(BadRequest, match="larger than the limit"):
        wire.item_assembler(100).add(message.chunks)
    assembler = wire.item_assembler(10_000)
    assembler.add(message.chunks[:1])
    with pytest.raises(BadRequest, match="goes on at byte 0"):
        assembler.add(message.chunks[:1])
    with pytest.raises(BadRequest, match="missing"):
        wire.read_item(message.item, assembler)


def test_a_wrong_checksum_or_field_is_refused() -> None:
    message = next(wire.item_messages("x", make_item()))
    message.item.tokens_crc32c ^= 1
    assembler = wire.item_assembler(10_000)
    assembler.add(message.chunks)
    with pytest.raises(BadRequest, match="checksum"):
        wire.read_item(message.item, assembler)
    item, tokens = make_item(), np.arange(4, dtype=np.int32)
    scores = make_scores(item)
    other = ScoreItem(item.token_ids[::-1].copy(), item.span, "math", wanted=item.wanted)
    with pytest.raises(ScoreProvenanceMismatch, match="was expected"):
        scores.check_against(other)
    for bad in (
        ScoreItem(tokens, (2, 5), "t"),
        ScoreItem(tokens, (2, 2), "t"),
        ScoreItem(tokens, (0, 4)),
        ScoreItem(tokens, (0, 4), "t", temperature=float("nan")),
        ScoreItem(tokens, (0, 4), "t", wanted=Wanted(False)),
        ScoreItem(tokens - 1, (1, 4), "t"),
        ScoreItem(tokens, (0, 4), "t", candidates=Ragged(tokens, np.array([0, 4]))),
    ):
        with pytest.raises(BadRequest):
            bad.check()


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    """Whatever the generator's version, it must describe the same messages; and run on protobuf 6."""
    protoc = pytest.importorskip("grpc_tools.protoc", reason="needs the generator")
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    out = tmp_path / "set"
    root = REPOSITORY / "proto"
    assert protoc.main(["", f"--proto_path={root}", f"--descriptor_set_out={out}", "scoring/v1/scoring.proto"]) == 0
    (now,) = FileDescriptorSet.FromString(out.read_bytes()).file
    committed = importlib.import_module("scoring.v1.scoring_pb2").DESCRIPTOR
    now.ClearField("source_code_info")
    expected = type(now)()
    committed.CopyToProto(expected)
    for message in (*now.message_type, *expected.message_type):
        for field in message.field:
            field.ClearField("json_name")
    assert now == expected
    service = now.service[0]
    stubs = (REPOSITORY / "scoring/v1/scoring_pb2_grpc.py").read_text()
    assert set(re.findall(r"'/scoring\.v1\.(\w+/\w+)'", stubs)) == {f"{service.name}/{m.name}" for m in service.method}
    types = re.findall(r"^class (\w+)\(_message", (REPOSITORY / "scoring/v1/scoring_pb2.pyi").read_text(), re.MULTILINE)
    assert sorted(types) == sorted(m.name for m in now.message_type)
    version = re.search(r"Protobuf Python Version: (\d+)", (REPOSITORY / "scoring/v1/scoring_pb2.py").read_text())
    assert version
    assert int(version[1]) <= 6
