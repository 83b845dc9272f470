"""How fast a dead engine's log is read back, and how much memory that takes.

`python -m benchmarks.recovery [--quick] [--json FILE]`

Logs with 8, 256 and 1024 requests per step, one log-probability each, requests that finish and are forgotten while
others go on. The floor is measured in the same run, interleaved: the same bytes read with pread and their CRC taken.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from crc32c import crc32c

from benchmarks._common import save, show
from rollout_wal.engine_log import EngineLog
from rollout_wal.engine_state import EngineState
from rollout_wal.log.policy import SyncPolicy
from rollout_wal.log.recovery import Recovery
from rollout_wal.log.storage import OsStorage

LENGTH = 2000
"""Tokens of a rollout; then it finishes, is forgotten, and its slot goes to the next."""


def build(path: Path, requests: int, tokens: int) -> int:
    """Write a log. Returns how many tokens are in it."""
    rng = np.random.default_rng(0)
    # Durability is not what is measured here; the bytes are the same.
    log = EngineLog.open(path, policy=SyncPolicy("none"))
    log.policy(1, "weights")
    slot_R = np.arange(requests, dtype=np.uint16)
    left_R = rng.integers(1, LENGTH, requests)
    rollout_R = np.arange(requests) + 1
    for slot, rollout in enumerate(rollout_R.tolist()):
        log.bind(slot, rollout, 1, 0)
    following = requests + 1
    steps = tokens // requests
    for step in range(steps):
        left_R -= 1
        finish_R = (left_R == 0).astype(np.uint8)
        log.append_step(
            slot_R, rng.integers(0, 1 << 17, requests).astype(np.uint32), finish_R, -rng.random(requests, np.float32)
        )
        if finish_R.any():
            over = np.flatnonzero(finish_R)
            log.forget(rollout_R[over].tolist())
            for slot in over.tolist():
                rollout_R[slot], left_R[slot] = following, LENGTH
                log.bind(slot, following, 1, 0)
                following += 1
        if step % 16 == 0:
            log.wait_durable()
    log.close()
    return steps * requests


def recover(path: Path) -> EngineState:
    """What opening the log reads, and nothing else: all frames, to the tokens of each attempt."""
    state = EngineState()
    recovery = Recovery(OsStorage(path, create=False))
    try:
        for frame in recovery.frames():
            state.apply(frame)
    finally:
        recovery.close()
    return state.finish()


def floor(path: Path) -> int:
    """Read the same bytes, and take their CRC."""
    crc = 0
    for segment in sorted(path.glob("*.seg")):
        file = OsStorage(path, create=False).open(segment.name)
        for at in range(0, file.size(), 4 << 20):
            crc = crc32c(file.pread(4 << 20, at), crc)
        file.close()
    return crc


def seconds(what: Callable[[], object]) -> float:
    begin = time.process_time()
    what()
    return time.process_time() - begin


def measure(requests: int, tokens: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="recovery-") as directory:
        path = Path(directory)
        held = build(path, requests, tokens)
        recover(path)  # warm: the page cache, and the imports
        pairs = [(seconds(lambda: recover(path)), seconds(lambda: floor(path))) for _ in range(rounds)]
        tracemalloc.start()
        state = recover(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        in_flight = sum(stream.length for stream in state.streams.values())
    return {
        "tokens": held,
        "tokens_per_s": round(held / median(r for r, _ in pairs)),
        "floor_tokens_per_s": round(held / median(f for _, f in pairs)),
        "ratio_to_read_floor": round(median(r / f for r, f in pairs), 2),
        "peak_bytes": peak,
        "in_flight_tokens": in_flight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scale, rounds = (10, 3) if arguments.quick else (1, 7)
    results = {
        requests: measure(requests, tokens // scale, rounds)
        for requests, tokens in ((8, 1_000_000), (256, 16_000_000), (1024, 24_000_000))
    }
    # Twice the log, the same in flight: memory must not follow the log.
    twice = measure(256, 32_000_000 // scale, 1)
    per_token = max(results[n]["peak_bytes"] / results[n]["in_flight_tokens"] for n in (256, 1024))
    show(
        "recovery, one core (CPU time; medians)",
        ("requests per step", "tokens", "recovered/s", "read + CRC/s", "x floor", "peak MiB", "in flight"),
        [
            (
                n,
                f"{r['tokens']:,}",
                f"{r['tokens_per_s'] / 1e6:.1f} M",
                f"{r['floor_tokens_per_s'] / 1e6:.0f} M",
                r["ratio_to_read_floor"],
                f"{r['peak_bytes'] / 2**20:.0f}",
                f"{r['in_flight_tokens']:,}",
            )
            for n, r in [*results.items(), ("256, log twice as long", twice)]
        ],
    )  # fmt: skip
    result = {
        "tokens_per_s_8": results[8]["tokens_per_s"],
        "tokens_per_s_256": results[256]["tokens_per_s"],
        "tokens_per_s_1024": results[1024]["tokens_per_s"],
        "ratio_to_read_floor": results[256]["ratio_to_read_floor"],
        "peak_bytes_per_inflight_token": round(per_token, 1),
        "peak_ratio_of_a_log_twice_as_long": round(twice["peak_bytes"] / results[256]["peak_bytes"], 3),
        "runs": {str(n): r for n, r in results.items()} | {"256 twice": twice},
    }
    save(arguments.json, result, quick=arguments.quick)


if __name__ == "__main__":
    main()
