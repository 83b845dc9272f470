"""Episodes are killed at every step of the dance between tokens, call, outcome and observation.

A counter file that each command increments shows how often it ran: never more than once; exactly once where no call
stays in doubt. Then the trajectory and the sandbox are those of the uninterrupted run, token for token.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_wal.backend import PoisonRule, RolloutBackend
from rollout_wal.episode import Episodes
from rollout_wal.testing.tiny_models import make_tiny_model
from sandbox_log.backends.local import remove_tree
from sandbox_log.faults import POINTS
from sandbox_log.log import SandboxLog

sys.path.insert(0, str(Path(__file__).parent))
import episode_job as job

DANCE = (
    "before_durable",
    "before_dispatch",
    *POINTS[1:],
    "during_command",
    "before_observe",
    "observe_pending",
    "observed",
)
#: Not marked as slow: of a worker's deaths, and of the whole process's, which take two processes each.
FAST = {"before_dispatch", "during_command", "observed"}
FAST_PROCESS = {"before_outcome"}
Files = dict[str, dict[str, str]]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=60.0)


def files(ground: Path) -> Files:
    """What each rollout's sandbox holds in the end; a bubblewrap's is in its overlay's upper folder, or in its tree."""
    found: Files = {}
    for box in sorted(ground.glob("sandbox-*")):
        held = next(box / name for name in ("workspace", "upper", "tree") if (box / name).is_dir())
        found[box.name] = {path.name: path.read_text() for path in sorted(held.iterdir())}
    return found


def run_here(model: Path, ground: Path, kind: str, during: Callable[[RolloutBackend], Any] | None = None) -> list[Any]:
    """The job in this process, whose workers may be killed."""
    with SandboxLog(ground / "log") as log:
        tools = job.make_tools(ground, kind, log)
        with RolloutBackend(
            model,
            ground / "wal",
            workers=1,
            slots=8,
            segment_bytes=1 << 18,
            episodes=Episodes(tools, job.CountingParser()),
            poison=PoisonRule(deaths=1000),
        ) as backend:
            if during is not None:
                during(backend)
            rollouts = list(backend.generate(job.PROMPTS, job.SAMPLING, group_size=2, cohort="job"))
            assert backend.balance().holds
            return rollouts


@pytest.fixture(scope="module")
def uninterrupted(model: Path) -> Iterator[tuple[dict[int, Any], Files]]:
    """index -> rollout, and the files of the sandboxes, where nobody died."""
    ground = Path(tempfile.mkdtemp(prefix="episode-test-"))
    try:
        rollouts = {r.index: r for r in run_here(model, ground, "local")}
        yield rollouts, files(ground)
    finally:
        remove_tree(ground)


def check_counts(found: Files) -> None:
    """Each command counts in a file of its own, so a second run of it would show."""
    for box in found.values():
        counts = {name: text for name, text in box.items() if name.startswith("count-")}
        assert all(text == "x\n" for text in counts.values()), counts
        assert len(box.get("history", "").splitlines()) == len(counts)


def test_the_workload_is_worth_killing(uninterrupted: Any) -> None:
    rollouts, found = uninterrupted
    check_counts(found)
    assert sum(r.turns for r in rollouts.values()) >= 12
    assert sum(len(box) - 1 for box in found.values()) >= 10
    bad = [100 + b for b in b"[that is no call]"]
    texts = [r.output.token_T[~r.output.sampled_T].tolist() for r in rollouts.values()]
    assert any(str(bad)[1:-1] in str(text) for text in texts), "a malformed call is part of it"
    for r in rollouts.values():
        assert int(r.output.sampled_T.sum()) == job.SAMPLING.max_tokens, "observed tokens do not count"
        assert (r.output.logprob.valid_T == r.output.sampled_T).all()
        ends = np.flatnonzero(r.output.sampled_T[:-1] & ~r.output.sampled_T[1:])
        assert all(int(token) in job.CountingParser.stop_token_ids for token in r.output.token_T[ends])


@pytest.mark.parametrize("point", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in DANCE])
def test_the_worker_dies(
    model: Path, ground: Path, uninterrupted: Any, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a point of the dance, the worker is killed; the sandbox's own process lives, so no call is ever in doubt."""
    rollouts, found = uninterrupted
    backends: list[RolloutBackend] = []
    killed: list[int] = []

    def kill_worker(*_: Any) -> None:
        for child in backends[0]._coordinator._workers:  # type: ignore[union-attr]
            if child.child is not None:
                os.kill(child.child.pid, signal.SIGKILL)
                killed.append(child.child.pid)

    for owner, name in ((job.Coordinator, "_frames"), (job.Turns, "take"), (job.RolloutWal, "observe")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back what `arm` replaces
    at = job.arm(point, 3, kill_worker)
    with SandboxLog(ground / "log", faults=at) as log:
        tools = job.make_tools(ground, "local", log)
        if point == "during_command":
            job.interrupt(tools, 3, kill_worker)
        backend = RolloutBackend(
            model,
            ground / "wal",
            workers=1,
            slots=8,
            segment_bytes=1 << 18,
            episodes=Episodes(tools, job.CountingParser()),
            poison=PoisonRule(deaths=1000),
        )
        backends.append(backend)
        with backend:
            again = {r.index: r for r in backend.generate(job.PROMPTS, job.SAMPLING, group_size=2, cohort="job")}
            assert backend.balance().holds
            assert backend.stats.tool_calls == sum(len(box) - 1 for box in found.values()), "no call was repeated"
    assert killed
    assert files(ground) == found
    for index, r in again.items():
        assert r.censored is None
        assert r.tokens.tolist() == rollouts[index].tokens.tolist()
        assert r.output.sampled_T.tolist() == rollouts[index].output.sampled_T.tolist()


def lives(
    model: Path, ground: Path, kind: str, *, between: Callable[[], None] | None = None, **config: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the job until it gets through. Returns what came out, each rollout once, and its last words."""
    out = ground / "out.jsonl"
    given = {"model": str(model), "ground": str(ground), "out": str(out), "sandbox": kind}
    deaths = 0
    for life in range(2):
        process = subprocess.run(
            [sys.executable, job.__file__, json.dumps({**given, **(config if life == 0 else {})})],
            timeout=280,  # two imports of torch each, on whatever machine this is
            check=False,
        )
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        deaths += 1
        if between is not None:
            between()
    assert deaths == 1, "it was killed once, and got through then"
    lines = [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    by_index = {line["index"]: line for line in lines if "index" in line}
    return [by_index[index] for index in sorted(by_index)], lines[-1]


def check_process_death(model: Path, ground: Path, kind: str, uninterrupted: Any, point: str) -> None:
    rollouts, found = uninterrupted
    out, last = lives(model, ground, kind, die_at=point, die_nth=3)
    assert last["done"]
    assert len(out) == len(rollouts)
    assert all(line["censored"] is None for line in out), "the wrapper's state survived: nothing stays in doubt"
    after = files(ground)
    check_counts(after)
    assert after == found, "every command ran exactly once"
    for line in out:
        twin = rollouts[line["index"]]
        assert line["tokens"] == twin.tokens.tolist()
        assert line["sampled"] == twin.output.sampled_T.tolist()
        assert (line["reason"], line["turns"]) == (twin.finish_reason.name, twin.turns)


@pytest.mark.parametrize("point", [p if p in FAST_PROCESS else pytest.param(p, marks=pytest.mark.slow) for p in DANCE])
def test_the_backend_s_process_dies(model: Path, ground: Path, uninterrupted: Any, point: str) -> None:
    check_process_death(model, ground, "local", uninterrupted, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["intent_durable", "during_command", "before_outcome"])
def test_the_backend_s_process_dies_over_bubblewrap(
    model: Path, ground: Path, uninterrupted: Any, why_no_bubblewrap: str | None, point: str
) -> None:
    if why_no_bubblewrap is not None:
        pytest.skip(why_no_bubblewrap)
    check_process_death(model, ground, "bubblewrap", uninterrupted, point)


@pytest.mark.parametrize("point", ["before_outcome", pytest.param("during_command", marks=pytest.mark.slow)])
def test_without_the_wrappers_state_the_rollout_is_delivered_as_in_doubt(
    model: Path, ground: Path, uninterrupted: Any, point: str
) -> None:
    """The command was dispatched, and what would tell what became of it is gone: nothing is guessed or run again."""
    rollouts, _ = uninterrupted

    def lose_the_state() -> None:
        for state in ground.glob("sandbox-*/state"):
            remove_tree(state)

    out, last = lives(model, ground, "local", between=lose_the_state, die_at=point, die_nth=3)
    assert last["done"]
    assert len(out) == len(rollouts), "each is accounted for"
    after = files(ground)
    check_counts(after)
    reasons = {line["censored"] for line in out}
    assert "in-doubt" in reasons
    # The others' sandboxes lost their state as well: where a log speaks of commands, nobody can go on from it.
    assert reasons <= {"in-doubt", "state-lost", None}
    for line in out:
        twin = rollouts[line["index"]]
        length = len(line["tokens"])
        assert line["tokens"] == twin.tokens.tolist()[:length]
        assert line["sampled"] == twin.output.sampled_T.tolist()[:length]
        if line["censored"] is None:
            assert length == len(twin.tokens)
        else:
            assert line["tokens"][-1] in job.CALL_ENDS, "it ends with the call that nobody can answer"
