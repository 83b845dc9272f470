"""One sealed rollout: metadata, and columns with one entry per token.

Shape legend: T = tokens of the sample (prompt and response), R = policy-version runs, K = columns of a top-k list,
D = width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """Values of which some are missing. What stands under `valid == False` means nothing and is not kept.

    Args:
        values: [T] or [T, K], any numeric dtype.
        valid: bool [T].
    """

    values: NDArray[Any]
    valid: NDArray[np.bool_]


#: [T] or [T, K] of a numeric dtype; uint16 with `bfloat16` named in `ColumnGroup.bfloat16` holds bfloat16 bits.
Column = NDArray[Any] | Masked


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who computed a group of columns, from what (digests are lower-case hex)."""

    source: str
    """Teacher id, reward function or whatever else produced the columns."""
    checkpoint: str = ""
    tokenizer_digest: str = ""
    chat_template_digest: str = ""
    precision: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ColumnGroup:
    """Per-token columns of one sample that are stored, compressed and read together, apart from all others.

    Args:
        columns: name to [T] or [T, K].
        provenance: who computed them.
        tokens_crc32c: checksum of the tokens that the columns were computed from, as `tokens_crc32c` computes it; a
            group whose checksum is not the sample's is refused. None: the caller vouches for it.
        bfloat16: names of uint16 columns whose bits are bfloat16 (numpy has no such dtype).
    """

    columns: Mapping[str, Column]
    provenance: Provenance | None = None
    tokens_crc32c: int | None = None
    bfloat16: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sealed rollout.

    Args:
        key: unique in the dataset and the same at every attempt to seal it: what makes sealing idempotent.
        rollout: the rollout's id in its log, 0 or more.
        token_ids: int32 [T], the prompt first.
        prompt_length: how many of them were given; the other `response_length` followed.
        segment_kinds: uint8 [T], a `SegmentKind` each.
        loss_mask: bool [T]; None derives it from the segment kinds. May switch sampled tokens off, never others on.
        logprobs: float32 [T], of each token under the model's own distribution; masked where nothing was sampled.
        sampling_logprobs: float32 [T], under the distribution it was drawn from; likewise.
        policy_runs: (policy version, tokens) in order over the response tokens; the token counts add up to the response
            length. Observed tokens are in the run of the sampled ones before them: no policy made them, and a version
            of their own would make a rollout look older, or newer, than it is.
        groups: further columns by group name, such as "teacher.math", "hidden.math", "returns".
        group: the rollouts of one prompt that are compared with each other.
        reward: of the whole rollout; None where there is none yet.
        finish_reason: why it ended, in lower case ("eos", "max_tokens", ...).
        censored: why a rollout that did not end is delivered all the same; None for one that did.
        interruptions: how many times it was resumed.
        sampling: sampling parameters, plain types.
        extras: free-form, plain types; kept as JSON, see `extras`.
        The remaining fields say which code, weights and configuration made it.
    """

    key: str
    rollout: int
    token_ids: NDArray[np.int32]
    prompt_length: int
    segment_kinds: NDArray[np.uint8]
    loss_mask: NDArray[np.bool_] | None = None
    logprobs: Masked | None = None
    sampling_logprobs: Masked | None = None
    policy_runs: tuple[tuple[int, int], ...] = ()
    groups: Mapping[str, ColumnGroup] = field(default_factory=dict)
    group: str = ""
    domain: str = ""
    teachers: tuple[str, ...] = ()
    reward: float | None = None
    finish_reason: str = ""
    censored: str | None = None
    interruptions: int = 0
    router_id: str | None = None
    router_version: str | None = None
    router_reason: str | None = None
    verifier_version: str | None = None
    tokenizer_digest: str = ""
    chat_template_digest: str = ""
    engine: str = ""
    engine_version: str = ""
    architecture_digest: str = ""
    seed: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens, the prompt's included."""
        return len(self.token_ids)

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


def tokens_crc32c(token_ids_T: NDArray[np.integer[Any]]) -> int:
    """CRC32C over the token ids as little-endian int32: what scores are tied to."""
    return int(crc32c(np.ascontiguousarray(token_ids_T, dtype="<i4").data))
