"""Writes the golden logs of a format version: `python -m tests.golden.write DIRECTORY`.

The committed ones are never written again: every later version must read them as they are.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path

import numpy as np

from rollout_wal.engines.base import FinishReason
from rollout_wal.log.policy import SyncPolicy
from rollout_wal.params import SamplingParams
from rollout_wal.wal import RolloutWal

SEGMENT_BYTES = 768


def write(path: Path) -> None:
    """Three rollouts: observed tokens, a policy change, rotation, several owners, a cleaned engine log."""
    options = {"segment_bytes": SEGMENT_BYTES, "policy": SyncPolicy("step")}
    with RolloutWal.open(path, **options) as wal:  # type: ignore[arg-type]
        cohort = wal.begin_cohort("golden", "digest", 3)
        ids = [
            wal.begin([5, 6, 7 + i], SamplingParams(max_tokens=64), seed=i, cohort=cohort, index=i) for i in range(3)
        ]
        for rollout in ids:
            wal.attempt(rollout, "0")
        wal.wait_durable()
        engine = wal.engine_log("0", prepare_ahead=False)
        engine.held = deque()
        engine.policy(1, "weights-1")
        for slot, rollout in enumerate(ids):
            engine.bind(slot, rollout, 1, 0)
        for step in range(30):
            if step == 20:
                engine.policy(2, "weights-2")
            rows = 3 if step < 10 else 2
            engine.append_step(
                np.arange(rows, dtype=np.uint16),
                np.arange(rows, dtype=np.uint32) + 100 * step,
                np.full(rows, 1 if step == 29 else 0, np.uint8),
                np.arange(rows, dtype=np.float32) - step,
                np.arange(rows, dtype=np.float32) - step - 0.5 if step % 2 else None,
                count_R=None,
            )
            engine.wait_durable()
            if step == 15:
                engine.forget([ids[2]])
                engine.clean(min_segments=2)
        engine.close()
        wal.absorb("0")
        wal.finish(ids[0], FinishReason.EOS)
        wal.observe(ids[1], [900, 901])
        wal.censor(ids[2], "deadline")
        wal.wait_durable()
    with RolloutWal.open(path, **options) as wal:  # type: ignore[arg-type]
        wal.delivered([ids[0], ids[2]])
        wal.consumed([ids[0]], epoch=0, step=4)
        wal.wait_durable()
    for lock in path.rglob("LOCK"):
        lock.unlink()
    for claim in path.rglob("epoch-*"):
        claim.write_text("for people only\n")


def expected(path: Path) -> dict[str, object]:
    """What the job adds up to, as plain values."""
    from rollout_wal.commands.inspect import summary
    from rollout_wal.job_view import JobView

    view = JobView(path)
    view.refresh()
    rollouts = []
    for rollout in view.job.rollouts.values():
        tokens = view.tokens(rollout)
        rollouts.append(
            {
                **summary(view, rollout),
                "token": tokens.token_T.tolist(),
                "sampled": tokens.sampled_T.tolist(),
                "logprob": tokens.logprob.value_T.tolist(),
                "logprob_valid": tokens.logprob.valid_T.tolist(),
                "version": tokens.version_T.tolist(),
            }
        )
    return {"counts": view.counts(), "rollouts": rollouts}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target)
    (target / "expected.json").write_text(json.dumps(expected(target), indent=1) + "\n")
