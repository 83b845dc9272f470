"""Spans that two tokenizers cut at: sums over the same bytes, and nothing finer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from rollout_wal.dataset import Masked
from rollout_wal.testing.tiny_models import make_tiny_model
from scoring.errors import BadConfiguration, BadRequest
from scoring.spans import TokenBytes, align, student_sums
from scoring.teachers.hf import HfTeacherSource

TEXTS = (
    [f"{i} + {j} = {i + j}" for i in range(30) for j in range(30)],
    [f"the sum of {i} and {j} equals {i + j}, – naïvely ☃" for i in range(30) for j in range(30)],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("spans")
    student = make_tiny_model(root / "student", texts=TEXTS[0], vocab_size=330, seed=0)
    return student, make_tiny_model(root / "teacher", texts=TEXTS[1], vocab_size=420, seed=1)


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> tuple[TokenBytes, TokenBytes]:
    return TokenBytes(folders[0]), TokenBytes(folders[1])


@given(text=st.text(max_size=60), tail=st.binary(max_size=3), start=st.integers(0, 3))
def test_spans_hold_the_same_bytes_on_both_sides(pair: Any, text: str, tail: bytes, start: int) -> None:
    student, teacher = pair
    singles = {student.bytes_of(i): i for i in range(4, 260)}
    ids = student.encode(text.encode()) + [singles[bytes([b])] for b in tail]
    start = min(start, len(ids))
    found = align(student, teacher, np.array(ids, np.int32), start)
    student_from, teacher_from = start, found.teacher_start
    for student_to, teacher_to in zip(found.student_ends.tolist(), found.teacher_ends.tolist()):
        assert student_to > student_from
        assert teacher_to > teacher_from
        ours = b"".join(student.bytes_of(i) for i in ids[student_from:student_to])
        theirs = b"".join(teacher.bytes_of(i) for i in found.teacher_ids[teacher_from:teacher_to].tolist())
        assert ours == theirs
        # No cut that both make lies within a span: it is as fine as can be.
        cuts = np.cumsum([len(student.bytes_of(i)) for i in ids[student_from:student_to]])[:-1]
        other = np.cumsum([len(teacher.bytes_of(i)) for i in found.teacher_ids[teacher_from:teacher_to].tolist()])[:-1]
        assert not set(cuts.tolist()) & set(other.tolist())
        student_from, teacher_from = student_to, teacher_to


def test_the_sums_are_those_of_a_direct_forward_and_are_kept_at_the_ends_of_spans(
    folders: tuple[Path, Path], pair: tuple[TokenBytes, TokenBytes]
) -> None:
    student, teacher = pair
    prompt, response = student.encode(b"the sum of 3 and 4"), student.encode(" equals 7, naïvely ☃".encode())
    eos = Tokenizer.from_file(str(folders[0] / "tokenizer.json")).token_to_id("<eos>")
    ids = np.array([*prompt, *response, eos], np.int32)
    found = align(student, teacher, ids, len(prompt))
    assert int(found.student_ends[-1]) == len(ids) - 1, "the end of sequence has no bytes, and no span"
    loaded = HfTeacherSource("t", folders[1], precision="float32")
    item = found.item("t")
    (scores,) = loaded.load().score([item])
    scores.check_against(item)
    mask = np.arange(len(ids)) >= len(prompt)
    group = found.columns(scores, ids, mask)
    logprob, tokens = group.columns["span_logprob"], group.columns["span_tokens"]
    assert isinstance(logprob, Masked)
    assert isinstance(tokens, Masked)
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(found.teacher_ids.astype(np.int64))[None]).logits[0].double()
    each = torch.log_softmax(logits[:-1, : loaded.info.vocabulary], -1)
    each = each.gather(1, torch.from_numpy(found.teacher_ids[1:].astype(np.int64))[:, None])[:, 0].numpy()
    at = found.teacher_start
    for end, teacher_end in zip(found.student_ends.tolist(), found.teacher_ends.tolist()):
        np.testing.assert_allclose(logprob.values[end - 1], each[at - 1 : teacher_end - 1].sum(), atol=1e-4)
        at = teacher_end
    assert logprob.valid.sum() == len(found.student_ends) < len(response)
    assert group.provenance is not None
    assert group.provenance.tokenizer_digest == ""
    assert loaded.info.provenance.tokenizer_digest in group.provenance.precision

    own = torch.randn(len(ids), dtype=torch.float64, requires_grad=True)
    sums = student_sums(own, torch.from_numpy(tokens.values), torch.from_numpy(tokens.valid))
    start = len(prompt)
    for end in found.student_ends.tolist():
        torch.testing.assert_close(sums[end - 1], own[start:end].sum())
        start = end
    sums.sum().backward()
    assert own.grad is not None
    np.testing.assert_array_equal(own.grad.numpy() != 0, mask & (np.arange(len(ids)) < len(ids) - 1))

    holed = mask.copy()
    holed[len(prompt)] = False
    fewer = found.columns(scores, ids, holed).columns["span_logprob"]
    assert isinstance(fewer, Masked)
    assert fewer.valid.sum() == logprob.valid.sum() - 1, "a span with an observed token is left out"


def test_what_cannot_be_aligned_is_refused(folders: tuple[Path, Path], pair: Any, tmp_path: Path) -> None:
    student, teacher = pair
    with pytest.raises(BadConfiguration, match="no byte-level tokenizer"):
        TokenBytes(tmp_path)
    with pytest.raises(BadRequest, match="no token 99999"):
        align(student, teacher, np.array([99999], np.int32), 0)
    with pytest.raises(BadRequest, match="no end of a student's token"):
        align(student, teacher, np.array([5], np.int32), 1).item("t")
