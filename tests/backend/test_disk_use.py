"""What a job takes on disk, in descriptors and in memory follows what is in flight, not what it ever generated."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout_wal.backend import RolloutBackend
from rollout_wal.params import SamplingParams

SEGMENT = 1 << 15


def taken(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_many_cohorts_through_small_segments(
    backend: Callable[..., RolloutBackend], prompts: Any, reference: Any, until: Any, tmp_path: Path
) -> None:
    sampling = SamplingParams(max_tokens=60)
    sizes: list[int] = []
    tokens = 0
    with backend(segment_bytes=SEGMENT) as b:
        # One cohort that lives through all of it: logs are cleaned underneath its running rollouts.
        lasting = b.generate(prompts[:2], SamplingParams(max_tokens=1800, ignore_eos=True), cohort="lasting")
        descriptors: list[int] = []
        for step in range(60):
            rollouts = list(b.generate(prompts, sampling, group_size=4, seed=step))
            tokens += sum(len(r.output) for r in rollouts)
            b.consumed([r.id for r in rollouts], epoch=0, step=step)
            sizes.append(taken(tmp_path / "wal"))
            assert b.balance().holds
            if step == 30:
                b.kill_worker("0", signal.SIGKILL)
                until(lambda: len(b.worker_steps()) == 2)
            descriptors.append(len(os.listdir("/proc/self/fd")))
        survivors = list(lasting)
        c = b._running()
        assert {key[0] for key in c.wal.streams} == {r.id for r in survivors}
        mirrored = {key[0] for w in c._workers for key in w.mirror.streams}
        assert mirrored <= {r.id for r in survivors}
        assert len(c.endings) == len(c._scheduler._died_at) == 0
    assert tokens * 16 > 8 * SEGMENT  # it would have filled many segments
    # Each of three logs may keep a few segments until a checkpoint is worth it, one in use and one prepared.
    assert max(sizes) < 3 * 10 * SEGMENT
    assert max(sizes[40:]) < 1.5 * max(sizes[5:20])
    assert max(descriptors[40:]) <= max(descriptors[5:20]) + 4
    expected = reference(prompts[:2], SamplingParams(max_tokens=1800, ignore_eos=True), cohort="lasting")
    assert {r.index: r.tokens.tolist() for r in survivors} == dict(enumerate(expected))
