"""What a call of `generate` asks for: checked as a whole, then begun as a closed cohort (I10).

Whatever could be wrong is found before anything is logged; and all of a cohort is durable before any of it runs, so
that which rollouts there are never depends on which of them finished first.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import msgpack
from numpy.typing import ArrayLike

from ..engines.base import EngineInfo
from ..episode import Episodes
from ..errors import BadInput, problem
from ..params import SamplingParams
from ..prompts import check_prompt, cohort_digest, cohort_seed, rollout_seed
from ..records import Begin, check_depth
from ..wal import RolloutWal
from .arguments import whole

Noise = Literal["position", "attempt"]


class Submission:
    """One call's rollouts, in order of index: the `group_size` ones of the first prompt, of the second, and so on.

    Args: those of `RolloutBackend.generate`.

    Raises:
        BadInput, BadPrompt: nothing was begun.
    """

    def __init__(
        self,
        prompts: Sequence[ArrayLike],
        sampling: SamplingParams,
        *,
        group_size: int,
        seed: int | None,
        metadata: Sequence[Mapping[str, Any]] | None,
        noise: Noise,
        info: EngineInfo | None,
        episodes: Episodes | None,
    ) -> None:
        group_size = whole("group_size", group_size)
        seed = None if seed is None else whole("seed", seed)
        self.size = len(prompts) * group_size
        if self.size < 1 or group_size < 1 or (metadata is not None and len(metadata) != len(prompts)):
            raise BadInput(
                problem(
                    f"{len(prompts)} prompts, group_size {group_size}, "
                    f"{len(metadata) if metadata is not None else 'no'} metadata entries",
                    consequence="Nothing was begun",
                    remedy="Pass at least one prompt, a group size of at least 1, and one metadata entry per prompt",
                )
            )
        if noise not in get_args(Noise) or not -(1 << 63) <= (seed or 0) < 1 << 64:
            raise BadInput(
                problem(
                    f"noise={noise!r} with seed {seed}",
                    consequence="Nothing was begun",
                    remedy=f"Use one of {list(get_args(Noise))} and a seed of at most 64 bits",
                )
            )
        self._prompts = [check_prompt(p, info) for p in prompts]
        self._metadata = [_plain(m) for m in metadata] if metadata is not None else None
        self._sampling = sampling
        self._group_size = group_size
        self._seed = seed
        self._noise = noise
        self._turns = episodes.record() if episodes is not None else {}
        # What no record can hold is found now. Once the cohort is logged it would be too late: its name would stand in
        # the log with nothing behind it, and the corrected call, which is another one, be refused for good.
        Begin(0, self._prompts[0], sampling.to_dict(), rollout_seed(seed or 0, 0), noise, turns=self._turns).encode()
        self.digest = cohort_digest(
            self._prompts, sampling, group_size=group_size, seed=seed, noise=noise, turns=self._turns
        )

    @property
    def has_stops(self) -> bool:
        """Whether stop strings will have to be found."""
        return bool(self._sampling.stop or self._turns.get("stop"))

    def begin(self, wal: RolloutWal, name: str) -> tuple[int, list[int]]:
        """Begin what has not begun, durably. Returns the cohort's number, and the rollouts that are new.

        Raises:
            CohortMismatch: the name is in the log with other contents.
        """
        cohort = wal.begin_cohort(name, self.digest, self.size)
        number = cohort.record.cohort
        # A crash in the middle of this loop leaves some begun and none of the others known: they begin now.
        begun = {r.begin.index for r in cohort.members.values()}
        seed = cohort_seed(name) if self._seed is None else self._seed
        fresh = [
            wal.begin(
                self._prompts[index // self._group_size],
                self._sampling,
                seed=rollout_seed(seed, index),
                noise=self._noise,
                cohort=cohort,
                index=index,
                group=f"{name}/{index // self._group_size}",
                metadata=self._metadata[index // self._group_size] if self._metadata is not None else None,
                turns=self._turns,
            )
            for index in range(0 if not cohort.complete else self.size, self.size)
            if index not in begun and index not in cohort.released_members
        ]
        wal.wait_durable()
        return number, fresh


class Names:
    """Names of cohorts whose callers gave none: the k-th call with equal contents is the k-th such cohort that is not
    used up. So a caller that repeats its calls after a crash, in the same order, finds its cohorts again."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        """By contents: every ordinal below was given, or was used up; neither ever ends. What equal calls have had
        before is not looked at again at each of them."""

    def give(self, wal: RolloutWal, digest: str) -> str:
        """The name of the next cohort with these contents."""
        ordinal = self._next.get(digest, 0)
        while (known := wal.state.cohort_named(f"{digest}.{ordinal}")) is not None and known.used >= known.record.size:
            ordinal += 1
        self._next[digest] = ordinal + 1
        return f"{digest}.{ordinal}"


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it will be read back from the log."""
    try:
        plain: dict[str, Any] = msgpack.unpackb(msgpack.packb(dict(metadata)), strict_map_key=False)
        check_depth(plain)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(
            problem(
                f"the metadata {reprlib.repr(metadata)} cannot be logged: {error}",
                consequence="Nothing was begun",
                remedy="Use strings, numbers, booleans, None, bytes, and lists and mappings of them",
            )
        ) from error
    return plain
