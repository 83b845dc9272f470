"""Freshness windows, and what they remove.

A window breaks the closed cohort by design: long rollouts live through more weight updates than short ones. A cut on
the *last* version, or on the oldest, removes the long and interrupted ones; a cut on the version that a rollout
*started* under removes rollouts by when they began, which does not depend on how long they became. The third way keeps
the rollouts and judges their tokens. Whatever is chosen, the report says what was removed, by length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import DatasetError, problem
from .rows import PayloadRow


@dataclass(frozen=True, slots=True)
class Freshness:
    """Which rollouts are recent enough.

    Args:
        current_version: the policy version that is about to be trained.
        max_lag: versions below `current_version - max_lag` are stale.
        by: "start" keeps a rollout if the version of its first response token is fresh; "tokens" if at least
            `min_fresh_share` of its response tokens are, what tools returned counted with the turn that it answers.
            With "tokens", mask the stale rest: `fresh_tokens`.
        min_fresh_share: in (0, 1]; only with "tokens".
    """

    current_version: int
    max_lag: int
    by: Literal["start", "tokens"] = "start"
    min_fresh_share: float = 0.5

    def __post_init__(self) -> None:
        if self.max_lag < 0 or self.by not in ("start", "tokens") or not 0.0 < self.min_fresh_share <= 1.0:
            raise DatasetError(
                problem(
                    f"{self!r} is no freshness window",
                    consequence="Nothing was planned",
                    remedy="Use max_lag >= 0, by 'start' or 'tokens', and min_fresh_share in (0, 1]",
                )
            )

    @property
    def oldest(self) -> int:
        """The oldest version that is still fresh."""
        return self.current_version - self.max_lag

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that `keep` reads."""
        if self.by == "start":
            return ("policy_version_start",)
        return ("policy_versions", "policy_version_tokens")

    def keep(self, metadata: Any) -> NDArray[np.bool_]:
        """bool [N]: which rows of a metadata table are fresh. One without a response token is: nothing is stale."""
        if self.by == "start":
            start = metadata["policy_version_start"].combine_chunks()
            fresh = start.fill_null(self.oldest).to_numpy() >= self.oldest
            return np.asarray(fresh, dtype=np.bool_)
        keep = [np.zeros(0, dtype=np.bool_)]
        for batch in metadata.select(list(self.columns)).to_batches():
            versions, counts = batch.column("policy_versions"), batch.column("policy_version_tokens")
            tokens = counts.flatten().to_numpy()
            fresh_tokens = np.where(versions.flatten().to_numpy() >= self.oldest, tokens, 0)
            runs = versions.value_lengths().to_numpy()
            total, fresh_total = (_sums(values, runs) for values in (tokens, fresh_tokens))
            keep.append(fresh_total >= self.min_fresh_share * total)
        return np.concatenate(keep)


def _sums(values: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """The sum of each of the consecutive stretches of `values`."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.asarray(running[ends] - running[ends - lengths], dtype=np.int64)


def token_versions(tokens: PayloadRow) -> NDArray[np.int64]:
    """int64 [T_response]: the policy version of each response token of a row of the group `tokens`."""
    return np.repeat(tokens.array("policy_versions"), tokens.array("policy_version_tokens"))


def fresh_tokens(tokens: PayloadRow, window: Freshness) -> NDArray[np.bool_]:
    """bool [T]: False for response tokens of stale versions, True for all others (the prompt has no version)."""
    versions = token_versions(tokens)
    out = np.ones(len(tokens.array("token_ids")), dtype=np.bool_)
    out[len(out) - len(versions) :] = versions >= window.oldest
    return out


_REMOVED_SCHEMA: Any = pa.schema(
    [
        ("length_min", pa.int64()),
        ("length_max", pa.int64()),
        ("samples", pa.int64()),
        ("removed", pa.int64()),
        ("removed_share", pa.float64()),
        ("removed_tokens", pa.int64()),
    ]
)


def removed_by_length(response_lengths_N: NDArray[Any], keep_N: NDArray[np.bool_], parts: int = 10) -> Any:
    """What a window removed, by quantile of the response length, as an Arrow table.

    One row per part of equal sample counts: shortest and longest length in it, samples, removed, removed_share,
    removed_tokens. Were the window blind to length, all shares would be alike.
    """
    order = np.argsort(response_lengths_N, kind="stable")
    rows: list[Mapping[str, Any]] = []
    for part in np.array_split(order, parts):
        if len(part) == 0:
            continue
        lengths, gone = response_lengths_N[part], ~keep_N[part]
        rows.append(
            {
                "length_min": int(lengths[0]),
                "length_max": int(lengths[-1]),
                "samples": len(part),
                "removed": int(gone.sum()),
                "removed_share": float(gone.mean()),
                "removed_tokens": int(lengths[gone].sum()),
            }
        )
    return pa.Table.from_pylist(rows, schema=_REMOVED_SCHEMA)
