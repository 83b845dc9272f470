"""What a trainer knows of a rollout and the log does not: who judged and who taught, and what the loss left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset import Sample, SegmentKind


@dataclass(frozen=True, slots=True)
class Facts:
    """Archived with a consumed rollout, for `rollout-wal trace`.

    Args:
        verifier: what gave the reward, with its version if it has one.
        teachers: ids of those whose opinion the loss had.
        router, router_version, reason: what chose the teachers, and why these.
        left_out: (start, end) ranges of completion tokens that were sampled and that the loss did not see.
    """

    verifier: str | None = None
    teachers: tuple[str, ...] = ()
    router: str | None = None
    router_version: str | None = None
    reason: str | None = None
    left_out: tuple[tuple[int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is not known is absent."""
        raw = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in raw.items() if value}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Facts:
        lists = {
            "teachers": tuple(raw.get("teachers", ())),
            "left_out": tuple((int(a), int(b)) for a, b in raw.get("left_out", ())),
        }
        return cls(**{**raw, **lists})

    def add_to(self, sample: Sample) -> Sample:
        """The sample, with what is known here."""
        mask_T = None
        if self.left_out:
            mask_T = np.asarray(sample.segment_kinds) == SegmentKind.SAMPLED
            for start, end in self.left_out:
                mask_T[sample.prompt_length + start : sample.prompt_length + end] = False
        return replace(
            sample,
            verifier_version=self.verifier,
            teachers=self.teachers,
            router_id=self.router,
            router_version=self.router_version,
            router_reason=self.reason,
            loss_mask=mask_T,
        )


def left_out(sampled_T: NDArray[np.bool_], used_T: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """The ranges of tokens that were sampled and not used.

    Args:
        sampled_T, used_T: bool [T], of the completion.
    """
    return tuple(_ranges(sampled_T & ~used_T))


def _ranges(flags_T: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags_T, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield int(start), int(end)
