"""Delivery into a dataset: output commit, then the manifest, then Release. The one way out for what is kept.

    durable Finish ─▶ samples ─▶ fence check ─▶ manifest (durable) ─▶ Release (durable) ─▶ space given back

A crash between the manifest and the Release delivers the same rollouts again, under the same keys, and the dataset
takes each key once. A crash before the manifest leaves nothing in the dataset and everything in the log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from .backend import FinishedRollout, RolloutBackend
from .dataset import DatasetWriter, Masked, Sample, SegmentKind
from .engines.base import EngineInfo
from .params import SamplingParams


def to_sample(rollout: FinishedRollout, info: EngineInfo, sampling: SamplingParams) -> Sample:
    """A delivered rollout as a sample: prompt and output in one row of tokens, everything missing masked."""
    output = rollout.output
    n_prompt = len(rollout.prompt)
    sampled = np.concatenate([np.zeros(n_prompt, np.bool_), output.sampled_T])
    kinds = np.full(len(sampled), SegmentKind.PROMPT, np.uint8)
    kinds[n_prompt:] = np.where(output.sampled_T, SegmentKind.SAMPLED, SegmentKind.TOOL_OUTPUT)
    for span in rollout.spans:
        kinds[n_prompt + span.start : n_prompt + span.end] = SegmentKind[span.kind.upper()]

    def whole(values: np.ndarray, valid: np.ndarray) -> Masked:
        missing = np.zeros(n_prompt, values.dtype)
        return Masked(
            np.concatenate([missing, values]), np.concatenate([np.zeros(n_prompt, np.bool_), valid]) & sampled
        )

    return Sample(
        key=rollout.key,
        rollout=rollout.id,
        token_ids=np.concatenate([rollout.prompt, output.token_T]).astype(np.int32),
        prompt_length=n_prompt,
        segment_kinds=kinds,
        logprobs=whole(output.logprob.value_T, output.logprob.valid_T),
        sampling_logprobs=whole(output.sampling_logprob.value_T, output.sampling_logprob.valid_T),
        policy_runs=tuple((int(version), len(list(run))) for version, run in groupby(output.turn_version_T.tolist())),
        group=rollout.group,
        domain=str(rollout.metadata.get("domain", "")),
        finish_reason=rollout.finish_reason.name.lower() if rollout.censored is None else "",
        censored=rollout.censored,
        interruptions=rollout.interruptions,
        tokenizer_digest=info.tokenizer_digest,
        chat_template_digest=info.chat_template_digest,
        engine=info.engine,
        engine_version=info.engine_version,
        architecture_digest=info.architecture_digest,
        seed=rollout.seed,
        sampling=sampling.to_dict(),
        extras=dict(rollout.metadata),
    )


@dataclass(slots=True)
class Sealed:
    """What a call of `seal` did."""

    rollouts: int = 0
    tokens: int = 0
    censored: int = 0
    already: int = 0
    """Were in the dataset from before a crash."""


def seal(
    backend: RolloutBackend,
    rollouts: Iterable[FinishedRollout],
    folder: Path,
    sampling: SamplingParams,
    *,
    batch: int = 256,
    seconds: float = 5.0,
    compression: str = "zstd",
) -> Sealed:
    """Put rollouts into a dataset as they finish, and release them from the log.

    Args:
        rollouts: from `backend.generate`, with these sampling parameters.
        batch, seconds: a commit is made when so many have come, or so long has passed; more per commit are fewer files.

    Raises:
        What `DatasetWriter.seal` and the backend raise. What was not committed is still in the log.
    """
    info = backend.info
    writer = DatasetWriter(
        folder, writer_id="rollouts", check_fence=backend.check_fence, default_compression=compression
    )
    done = Sealed()
    pending: list[FinishedRollout] = []
    since = time.monotonic()

    def commit() -> None:
        nonlocal since
        if pending:
            committed = writer.seal([to_sample(r, info, sampling) for r in pending])
            backend.release([r.id for r in pending])
            done.already += len(pending) - len(committed.added)
            pending.clear()
        since = time.monotonic()

    for rollout in rollouts:
        pending.append(rollout)
        done.rollouts += 1
        done.tokens += len(rollout.output)
        done.censored += rollout.censored is not None
        if len(pending) >= batch or time.monotonic() - since > seconds:
            commit()
    commit()
    return done
