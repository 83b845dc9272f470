"""A teacher with another tokenizer: sums over spans of bytes that both tokenizers cut at, and never scores of tokens.

The teacher reads the response's bytes in its own tokens. Where a token of the student and one of the teacher end at the
same byte, everything since the last such place is one *span*; over it, both have a log-probability of the same bytes.
Between such places there is no number that belongs to a token of the student, so none is made up.

A span is kept where its last student token is: `span_logprob` and `span_tokens` have a value there and are masked
elsewhere. `student_sums` gives the student's side of the same spans.

Shape legend: T = student tokens, S = spans.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_wal.dataset import ColumnGroup, Masked, Provenance, tokens_crc32c

from .errors import BadConfiguration, BadRequest, problem
from .items import ScoreItem, Scores, Wanted


class TokenBytes:
    """The bytes of each token of a byte-level BPE tokenizer, and the tokens of bytes.

    Args:
        folder: holds tokenizer.json.

    Raises:
        BadConfiguration: there is none, or its tokens are no byte strings (only byte-level BPE is: with SentencePiece
            a token's bytes depend on where it stands).
    """

    def __init__(self, folder: Path | str) -> None:
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        kinds: set[str] = set()
        if path.is_file():
            decoder = json.loads(path.read_text(encoding="utf-8")).get("decoder") or {}
            kinds = {d.get("type") for d in (decoder, *decoder.get("decoders", ()))}
        if "ByteLevel" not in kinds:
            raise BadConfiguration(
                problem(
                    f"{path} holds no byte-level tokenizer (decoders {sorted(map(str, kinds))})",
                    consequence="Its tokens cannot be aligned with another tokenizer's by their bytes",
                    remedy="Use a teacher and a student with byte-level BPE, or teachers that share the tokenizer",
                )
            )
        self._tokenizer = Tokenizer.from_file(str(path))
        special = {token_id for token_id, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        alphabet = _byte_of_character()
        self._bytes: dict[int, bytes | None] = {}
        for text, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id in special:
                self._bytes[token_id] = None
            elif all(c in alphabet for c in text):
                self._bytes[token_id] = bytes(alphabet[c] for c in text)
            else:
                self._bytes[token_id] = text.encode()  # an added token stands for itself

    def bytes_of(self, token_id: int) -> bytes | None:
        """None: a special token, which stands for no bytes. Raises BadRequest: no such token."""
        if token_id not in self._bytes:
            raise BadRequest(
                problem(
                    f"the tokenizer has no token {token_id}",
                    consequence="Nothing was aligned",
                    remedy="Pass token ids of this tokenizer",
                )
            )
        return self._bytes[token_id]

    def encode(self, raw: bytes) -> list[int]:
        """Tokens of valid UTF-8, without special ones."""
        ids: list[int] = self._tokenizer.encode(raw.decode(), add_special_tokens=False).ids
        return ids


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """A student's response in a teacher's tokens.

    Args:
        teacher_ids: int32, the teacher's context and then the response's tokens.
        teacher_start: where the response begins in them.
        student_ends, teacher_ends: int64 [S], the token after each span: positions in the student's sequence, and in
            teacher_ids. A span begins where the one before ends; the first at the response's start.
        student_start: where the first span begins in the student's sequence.
    """

    teacher_ids: NDArray[np.int32]
    teacher_start: int
    student_ends: NDArray[np.int64]
    teacher_ends: NDArray[np.int64]
    student_start: int

    @property
    def student_starts(self) -> NDArray[np.int64]:
        return np.concatenate(([self.student_start], self.student_ends[:-1])).astype(np.int64)

    def item(self, teacher: str, *, temperature: float = 1.0, expected: Provenance | None = None) -> ScoreItem:
        """What to ask of the teacher. Raises BadRequest: there is no span."""
        if not len(self.student_ends):
            raise BadRequest(
                problem(
                    "no end of a student's token is the end of a teacher's token",
                    consequence="There is nothing that both could have a probability of",
                    remedy="Leave the sample out",
                )
            )
        end = int(self.teacher_ends[-1])
        return ScoreItem(
            self.teacher_ids[:end],
            (self.teacher_start, end),
            teacher,
            temperature=temperature,
            wanted=Wanted(),
            expected=expected,
        )

    def sums(self, scores: Scores) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(sum of the teacher's log-probabilities, whether all of it is known) of each span: float32, bool [S]."""
        assert scores.logprobs is not None
        ends = self.teacher_ends - self.teacher_start
        starts = np.concatenate(([0], ends[:-1]))
        total = np.concatenate(([0.0], np.cumsum(np.where(scores.valid, scores.logprobs, 0.0), dtype=np.float64)))
        missing = np.concatenate(([0], np.cumsum(~scores.valid)))
        return (total[ends] - total[starts]).astype(np.float32), missing[ends] == missing[starts]

    def columns(self, scores: Scores, token_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> ColumnGroup:
        """The column group of a sample: span_logprob float32 [T] and span_tokens int32 [T], at each span's last token.

        A span with a token that the policy did not sample is left out. The group is tied to the student's tokens; the
        teacher's tokenizer is named with its precision, for its digest is not the dataset's.
        """
        sums, known = self.sums(scores)
        counts = self.student_ends - self.student_starts
        sampled = np.concatenate(([0], np.cumsum(loss_mask)))
        known &= sampled[self.student_ends] - sampled[self.student_starts] == counts
        last = self.student_ends[known] - 1
        valid = np.zeros(len(token_ids), np.bool_)
        valid[last] = True
        logprob, length = np.zeros(len(token_ids), np.float32), np.zeros(len(token_ids), np.int32)
        logprob[last], length[last] = sums[known], counts[known]
        p = scores.provenance
        provenance = Provenance(
            p.source, p.checkpoint, "", p.chat_template_digest, f"{p.precision} spans of tokenizer {p.tokenizer_digest}"
        )
        columns = {"span_logprob": Masked(logprob, valid), "span_tokens": Masked(length, valid)}
        return ColumnGroup(columns, provenance, tokens_crc32c(token_ids))


def align(
    student: TokenBytes,
    teacher: TokenBytes,
    token_ids: NDArray[np.int32],
    response_start: int,
    *,
    teacher_context: NDArray[np.int32] | None = None,
) -> Alignment:
    """The response of a student in a teacher's tokens, and the spans that both cut at.

    The response is read up to its first special token or byte that is no UTF-8: an end of sequence has no bytes, and
    one tokenizer's is not another's. What follows is not scored.

    Args:
        token_ids: int32 [T], the student's sequence.
        response_start: its first response token.
        teacher_context: what the teacher reads before the response, in its tokens: its own chat template around the
            same prompt. None: the prompt's bytes without its special tokens.
    """
    pieces: list[bytes] = []
    for token_id in token_ids[response_start:].tolist():
        piece = student.bytes_of(token_id)
        if piece is None:
            break
        pieces.append(piece)
    raw = b"".join(pieces)
    whole = raw[: _valid_utf8(raw)]
    if teacher_context is None:
        prompt = b"".join(student.bytes_of(t) or b"" for t in token_ids[:response_start].tolist())
        teacher_context = np.array(teacher.encode(prompt[: _valid_utf8(prompt)]), np.int32)
    response = teacher.encode(whole)
    teacher_pieces = [teacher.bytes_of(t) or b"" for t in response]
    if b"".join(teacher_pieces) != whole:
        raise BadRequest(
            problem(
                "the teacher's tokenizer does not give back the bytes that it was given (it normalises them)",
                consequence="Its tokens cannot be aligned with the student's",
                remedy="Use a teacher whose tokenizer keeps bytes as they are",
            )
        )
    student_at = np.cumsum([len(p) for p in pieces], dtype=np.int64)
    teacher_at = np.cumsum([len(p) for p in teacher_pieces], dtype=np.int64)
    # A token may hold no bytes at all: the last one that ends at a byte is the one that a span ends with.
    common = np.intersect1d(student_at, teacher_at)
    common = common[common > 0]
    student_ends = response_start + np.searchsorted(student_at, common, side="right")
    teacher_ends = len(teacher_context) + np.searchsorted(teacher_at, common, side="right")
    ids = np.concatenate((teacher_context, np.array(response, np.int32))).astype(np.int32)
    return Alignment(ids, len(teacher_context), student_ends, teacher_ends, response_start)


def student_sums(logprobs_T: Any, span_tokens_T: Any, valid_T: Any) -> Any:
    """The student's log-probability of each span, at the span's last token; 0 elsewhere. Differentiable.

        s_t = Σ_{t − n_t < i ≤ t} log π(y_i),   n_t = span_tokens_T[t]

    With `span_logprob` as the teacher's side it goes into `scoring.losses` like a token's, under `valid_T` as the mask.

    Args:
        logprobs_T: floating tensor [T].
        span_tokens_T: integer tensor [T]; read where valid.
        valid_T: bool tensor [T]: where spans end.
    """
    import torch

    total = torch.cat((logprobs_T.new_zeros(1), logprobs_T.cumsum(0)))
    ends = torch.arange(1, len(logprobs_T) + 1, device=logprobs_T.device)
    starts = (ends - span_tokens_T.to(ends)).clamp(min=0)
    return torch.where(valid_T, total[ends] - total[starts], torch.zeros_like(logprobs_T))


def _valid_utf8(raw: bytes) -> int:
    """How many leading bytes are whole UTF-8 characters."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
