"""What is asked of a teacher about one rollout, and what it answers.

Shape legend: T = tokens of the rollout, P = positions of the span, k = top tokens, H = the teacher's hidden size.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_wal.dataset import Provenance, tokens_crc32c

from .errors import BadRequest, BadResult, mismatch, problem

Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]

#: Beyond these, logits divided by the temperature overflow float32, or leave nothing of the distribution.
TEMPERATURES = (1e-4, 1e4)


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rows of unequal length: row i is values[offsets[i]:offsets[i + 1]].

    Args:
        values: [N].
        offsets: int64 [rows + 1], from 0 to N, never falling.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        o = self.offsets
        if self.values.ndim != 1 or o.ndim != 1 or len(o) < 1 or o[0] != 0 or o[-1] != len(self.values):
            return f"offsets of {len(o)} entries do not span the {self.values.shape} values"
        return "offsets fall" if bool((o[1:] < o[:-1]).any()) else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to compute at each position.

    Args:
        logprobs: the log-probability of the rollout's own token.
        top_k: that many most likely tokens, their log-probabilities, and the mass of all others.
        entropy: in nats, of the distribution at the item's temperature.
        hidden_states: of the last layer after the final norm, in bfloat16.
    """

    logprobs: bool = True
    top_k: int = 0
    entropy: bool = False
    hidden_states: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ScoreItem:
    """One rollout, and what to compute about it.

    Args:
        token_ids: int32 [T], the student's whole sequence.
        span: (start, end): the tokens to score, each given all before it.
        teacher: its id; or "" to let the server choose by `domain`.
        teacher_prefix_ids: int32, what the teacher sees instead of the tokens before the span: another system prompt,
            privileged context. None: what the student saw.
        temperature: logits are divided by it.
        candidates: int32 ids of which to give log-probabilities, a row for each position of the span.
        expected: what the teacher must be; empty fields expect nothing.
        deadline_s: seconds from arrival after which nobody waits; None: no deadline.
    """

    token_ids: Int32s
    span: tuple[int, int]
    teacher: str = ""
    domain: str = ""
    teacher_prefix_ids: Int32s | None = None
    temperature: float = 1.0
    wanted: Wanted = field(default_factory=Wanted)
    candidates: Ragged | None = None
    expected: Provenance | None = None
    deadline_s: float | None = None

    @property
    def positions(self) -> int:
        return self.span[1] - self.span[0]

    def read_ids(self) -> Int32s:
        """What the teacher reads: its prefix and the span."""
        start, end = self.span
        if self.teacher_prefix_ids is None:
            return self.token_ids[:end]
        return np.concatenate((self.teacher_prefix_ids, self.token_ids[start:end])).astype(np.int32)

    def result_bytes(self, hidden_size: int) -> int:
        """Memory that its result takes while it is computed, at most. Candidates are padded to the longest row."""
        row = 17 + 8 * self.wanted.top_k + 2 * hidden_size * self.wanted.hidden_states
        if self.candidates is not None:
            row += 16 * int(np.diff(self.candidates.offsets).max(initial=0))
        return self.positions * row

    def check(self) -> None:
        """Raises BadRequest if no teacher could score this."""
        start, end = self.span
        wanted = self.wanted
        wrong = None
        if not self.teacher and not self.domain:
            wrong = "it names neither a teacher nor a domain"
        elif not 0 <= start < end <= len(self.token_ids):
            wrong = f"its span {start}:{end} is not within its {len(self.token_ids)} tokens"
        elif not (TEMPERATURES[0] <= self.temperature <= TEMPERATURES[1]):
            wrong = f"its temperature is {self.temperature!r}, not within {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}"
        elif not (wanted.logprobs or wanted.top_k or wanted.entropy or wanted.hidden_states or self.candidates):
            wrong = "it wants nothing"
        elif int(self.read_ids().min()) < 0 or int(self.token_ids.min()) < 0:
            wrong = "it holds a negative token id"
        elif self.candidates is not None:
            wrong = self.candidates.problem()
            if len(self.candidates) != self.positions:
                wrong = f"it has candidates for {len(self.candidates)} of {self.positions} positions"
        if wrong:
            raise BadRequest(
                problem(
                    f"the item cannot be scored: {wrong}",
                    consequence="Nothing was computed for it",
                    remedy="Correct the item; sending it again as it is changes nothing",
                )
            )

    def key(self, provenance: Provenance) -> str:
        """The content address of the answer: a digest over everything that it depends on."""
        digest = hashlib.blake2b(digest_size=20)
        w = self.wanted
        for text in ("scores/1", *provenance_fields(provenance).values()):
            digest.update(struct.pack("<I", len(text.encode())) + text.encode())
        read = np.ascontiguousarray(self.read_ids(), "<i4")
        numbers = (len(read), self.positions, w.logprobs, w.top_k, w.entropy, w.hidden_states, self.temperature)
        digest.update(struct.pack("<QQ?Q??d", *numbers))
        digest.update(read.data)
        if self.candidates is not None:
            digest.update(b"candidates" + np.ascontiguousarray(self.candidates.offsets, "<i8").tobytes())
            digest.update(np.ascontiguousarray(self.candidates.values, "<i4").data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A teacher's answer; arrays that were not asked for are None. Row p is about token span[0] + p.

    What stands where `valid` is False means nothing: nothing precedes the first token of a sequence.
    """

    span: tuple[int, int]
    provenance: Provenance
    tokens_crc32c: int
    scored_crc32c: int
    request_key: str
    valid: NDArray[np.bool_]
    """[P]"""
    logprobs: Float32s | None = None
    """[P]"""
    top_ids: Int32s | None = None
    """[P, k], most likely first"""
    top_logprobs: Float32s | None = None
    tail_mass: Float32s | None = None
    """[P], the probability of all tokens that are not in the top k"""
    entropy: Float32s | None = None
    candidate_logprobs: Ragged | None = None
    hidden_states: NDArray[np.uint16] | None = None
    """[P, H], bfloat16 bits"""
    from_cache: bool = False
    server: str = ""
    fallback: bool = False
    """The answer comes from another checkpoint than the one that was expected, as the caller allowed."""

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        arrays = (self.valid, self.logprobs, self.top_ids, self.top_logprobs, self.tail_mass, self.entropy)
        ragged = self.candidate_logprobs
        total = sum(a.nbytes for a in (*arrays, self.hidden_states) if a is not None)
        return total + (0 if ragged is None else ragged.values.nbytes + ragged.offsets.nbytes)

    def check_against(self, item: ScoreItem) -> None:
        """See that this answers that item.

        Raises:
            ScoreProvenanceMismatch: other tokens, another span, or a teacher that is not the expected one.
            BadResult: something asked for is missing, of the wrong size, or not a number.
        """
        if self.tokens_crc32c != tokens_crc32c(item.token_ids):
            raise mismatch("the checksum of the scored rollout", self.tokens_crc32c, tokens_crc32c(item.token_ids))
        if self.scored_crc32c != tokens_crc32c(item.read_ids()):
            raise mismatch("the checksum of what was read", self.scored_crc32c, tokens_crc32c(item.read_ids()))
        if self.span != item.span:
            raise mismatch("the scored span", self.span, item.span)
        check_provenance(self.provenance, item.expected, item.teacher)
        if self.request_key != item.key(self.provenance):
            raise mismatch("the key of the answered request", self.request_key, item.key(self.provenance))
        rows, w = item.positions, item.wanted
        context = len(item.read_ids()) - rows
        expected_valid = np.arange(rows) + context > 0
        if self.valid.shape != (rows,) or bool((self.valid != expected_valid).any()):
            raise _bad("its validity mask is not that of the span")
        shapes: list[tuple[str, NDArray[Any] | None, tuple[int, ...] | None]] = [
            ("logprobs", self.logprobs, (rows,) if w.logprobs else None),
            ("top_ids", self.top_ids, (rows, w.top_k) if w.top_k else None),
            ("top_logprobs", self.top_logprobs, (rows, w.top_k) if w.top_k else None),
            ("tail_mass", self.tail_mass, (rows,) if w.top_k else None),
            ("entropy", self.entropy, (rows,) if w.entropy else None),
        ]
        for name, values, shape in shapes:
            if (None if values is None else values.shape) != shape:
                raise _bad(f"{name} has shape {None if values is None else values.shape}, not {shape}")
            if values is not None and values.dtype.kind == "f":
                _check_numbers(name, values, self.valid)
        if (self.hidden_states is None) == w.hidden_states:
            raise _bad("its hidden states are missing, or were not asked for")
        if self.hidden_states is not None:
            if self.hidden_states.ndim != 2 or len(self.hidden_states) != rows:
                raise _bad(f"hidden_states has shape {self.hidden_states.shape} for {rows} positions")
            if bool(((self.hidden_states & np.uint16(0x7F80)) == 0x7F80)[self.valid].any()):
                raise _bad("its hidden states hold NaN or infinity")
        found, asked = self.candidate_logprobs, item.candidates
        if (found is None) != (asked is None):
            raise _bad("its candidates are missing, or were not asked for")
        if found is not None and asked is not None:
            if not np.array_equal(found.offsets, asked.offsets) or found.problem():
                raise _bad("its candidates are not those that were asked for")
            _check_numbers("candidate_logprobs", found.values, np.repeat(self.valid, np.diff(found.offsets)))


def provenance_fields(provenance: Provenance) -> dict[str, str]:
    """Field names of the wire, in order."""
    return {
        "teacher": provenance.source,
        "checkpoint_digest": provenance.checkpoint,
        "tokenizer_digest": provenance.tokenizer_digest,
        "chat_template_digest": provenance.chat_template_digest,
        "precision": provenance.precision,
    }


def check_provenance(found: Provenance, expected: Provenance | None, teacher: str = "") -> None:
    """Raises ScoreProvenanceMismatch, naming both values of the first field in which they differ."""
    wanted = provenance_fields(expected) if expected else {}
    if teacher:
        wanted["teacher"] = teacher
    actual = provenance_fields(found)
    for name, value in wanted.items():
        if value and actual[name] != value:
            raise mismatch(f"{name} of teacher {found.source!r}", actual[name], value)


def _check_numbers(name: str, values: NDArray[Any], valid: NDArray[np.bool_]) -> None:
    if not len(values):  # candidates, of which no position has any
        return
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1) & valid
    if bad.any():
        raise _bad(f"{name} is not finite at row {int(bad.argmax())}")


def _bad(what: str) -> BadResult:
    return BadResult(
        problem(
            f"a result does not fit its request: {what}",
            consequence="It was dropped; nothing of it was stored",
            remedy="Score the item again; if it comes back the same, that server is broken",
        )
    )
