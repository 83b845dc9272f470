"""A trainer's checkpoints and the log: what was used, what is consumed, what comes again, and what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rollout_wal.backend import FinishedRollout, RolloutBackend
from rollout_wal.commands.trace import trace
from rollout_wal.dataset import open_dataset
from rollout_wal.errors import BadInput, CheckpointMismatch, CohortMismatch
from rollout_wal.params import SamplingParams
from rollout_wal.testing.tiny_models import make_tiny_model
from rollout_wal.trainers.ledger import STATE_FILE, Facts, TrainerLedger, read_state, write_state

SAMPLING = SamplingParams(max_tokens=12)
PROMPTS = [[1, 40, 50], [1, 41, 51]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("model"), mean_length=8.0)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., TrainerLedger]]:
    """Start a trainer's process, as it were: the one before is gone, with all that it had in memory."""
    with ExitStack() as stack:
        running: list[RolloutBackend] = []

        def make(run: str = "run", *, wal: str = "wal") -> TrainerLedger:
            if running:
                running.pop().close()
            backend = stack.enter_context(RolloutBackend(model, tmp_path / wal, slots=8, segment_bytes=1 << 18))
            running.append(backend)
            return TrainerLedger(backend, run, archive=tmp_path / "archive", extras={"trainer": "test"})

        yield make


def generate(ledger: TrainerLedger, batch: int) -> list[FinishedRollout]:
    return ledger.generate(batch, PROMPTS, SAMPLING, group_size=2, seed=batch)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


def tokens(rollouts: list[FinishedRollout]) -> list[tuple[int, list[int]]]:
    return [(r.id, r.tokens.tolist()) for r in rollouts]


def archived(folder: Path) -> dict[str, tuple[float | None, int]]:
    rows = open_dataset(folder / "archive").metadata().to_pylist()
    return {r["sample"]: (r["reward"], json.loads(r["extras"])["optimizer_step"]) for r in rows}


def test_what_no_checkpoint_contains_comes_again(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    ledger = start()
    ledger.restore(None)
    first = generate(ledger, 0)
    assert [r.index for r in first] == [0, 1, 2, 3]
    ledger.used(0, step=1, rewards={r.id: float(r.index) for r in first[:3]} | {first[3].id: float("nan")})
    saved = through_json(ledger.state(1, step=1))
    assert len(ledger.evaluate("0.1", PROMPTS, SAMPLING)) == 2
    ledger.commit(saved)
    assert ledger._backend.cohorts()["run.0/eval/0.1"].gone == 2
    # A script that evaluates before it trains does so under the same name each time it is started.
    assert len(ledger.evaluate("0.1", PROMPTS, SAMPLING)) == 2
    assert ledger._backend.cohorts()["run.0/eval/0.1.1"].gone == 0
    second = generate(ledger, 1)
    ledger.used(1, step=2)
    assert archived(tmp_path) == {
        "run.0/0/0": (0.0, 1),
        "run.0/0/1": (1.0, 1),
        "run.0/0/2": (2.0, 1),
        "run.0/0/3": (None, 1),
    }

    ledger = start()  # died after step 2 and before its checkpoint
    ledger.restore(saved)
    again = generate(ledger, 1)
    assert tokens(again) == tokens(second)
    assert all(r.again for r in again)
    with pytest.raises(CheckpointMismatch, match="batch 0 of run 'run' has 0 rollouts left"):
        generate(ledger, 0)


def test_dead_between_the_checkpoint_and_the_log(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    ledger = start()
    ledger.restore(None)
    rollouts = generate(ledger, 0)
    rewards = np.linspace(-1e-7, 1e7, len(rollouts)).tolist()
    judged = {r.id: Facts(f"judge {r.index}", left_out=((0, 1),)) for r in rollouts}
    ledger.used(0, step=1, rewards={r.id: x for r, x in zip(rollouts, rewards, strict=True)}, facts=judged)
    saved = through_json(ledger.state(1, step=1))

    ledger = start()  # the checkpoint was durable, the log knew nothing of it
    ledger.restore(saved)
    assert archived(tmp_path) == {f"run.0/0/{i}": (rewards[i], 1) for i in range(4)}
    rows = open_dataset(tmp_path / "archive").metadata().to_pylist()
    assert sorted(r["verifier_version"] for r in rows) == [f"judge {i}" for i in range(4)]
    assert all(r["response_length"] - r["loss_tokens"] == 1 for r in rows)
    ledger.restore(saved)  # and once more: nothing is done twice
    assert len(archived(tmp_path)) == 4
    generate(ledger, 1)


@pytest.mark.slow
def test_a_checkpoint_older_than_the_log(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    ledger = start()
    ledger.restore(None)
    states = []
    for batch in range(2):
        rollouts = generate(ledger, batch)
        ledger.used(batch, step=batch + 1)
        states.append(through_json(ledger.state(batch + 1, step=batch + 1)))
        ledger.commit(states[-1])
    pending = generate(ledger, 2)

    ledger = start()
    for state in (None, states[0]):
        with pytest.raises(CheckpointMismatch, match="has consumed batch 1"):
            ledger.restore(state)
    ledger.restore(states[0], fork=True)
    fresh = generate(ledger, 1)
    ledger = start()  # the same script again, before the fork has a checkpoint
    ledger.restore(states[0], fork=True)
    assert tokens(generate(ledger, 1)) == tokens(fresh)
    assert {r.id for r in fresh}.isdisjoint({r.id for r in rollouts} | {r.id for r in pending})
    assert {r.cohort for r in fresh} == {"run.1/1"}
    forked = through_json(ledger.state(2, step=2))
    ledger.used(1, step=2)
    ledger.commit(forked)

    ledger = start()
    for fork in (False, True):
        with pytest.raises(CheckpointMismatch, match="was forked: the log has lineage 1, from batch 1 on"):
            ledger.restore(states[0], fork=fork)
    ledger = start()  # a fork goes on as itself
    ledger.restore(forked)
    assert ledger.cohort(2) == "run.1/2"
    left = generate(ledger, 2)
    ledger.restore(states[0], fork="again")
    assert ledger.cohort(1) == "run.2/1"
    assert ledger._backend.cohorts()["run.1/2"].gone == len(left)


@pytest.mark.slow
def test_what_does_not_belong_together(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    ledger = start()
    ledger.restore(None)
    generate(ledger, 0)
    state = through_json(ledger.state(0, step=0))
    with pytest.raises(CohortMismatch):
        ledger.generate(0, PROMPTS[:1], SAMPLING, group_size=2, seed=0)
    with pytest.raises(CheckpointMismatch, match="the log is an older copy"):
        ledger.restore(state | {"lsn": state["lsn"] + 10_000})
    with pytest.raises(CheckpointMismatch, match="format 2"):
        ledger.restore(state | {"format": 2})
    with pytest.raises(CheckpointMismatch, match="belongs to run 'run'"):
        start("other").restore(state)
    with pytest.raises(CheckpointMismatch, match="of job"):
        start(wal="elsewhere").restore(state)
    with pytest.raises(BadInput, match="slash"):
        TrainerLedger(ledger._backend, "a/b")


def test_the_returned_list_is_the_callers(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    """A caller that replaces rollouts in it changes nothing of what is consumed and what is let go."""
    ledger = start()
    ledger.restore(None)
    rollouts = generate(ledger, 0)
    used = {r.id for r in rollouts}
    rollouts[:2] = ledger.evaluate("0.again", PROMPTS, SAMPLING)
    ledger.used(0, step=1, rewards=dict.fromkeys(used, 1.0))
    ledger.commit(ledger.state(1, step=1))
    assert [reward for reward, _ in archived(tmp_path).values()] == [1.0] * 4
    ledger.commit(ledger.state(1, step=1))  # nothing is left that could be let go of a second time


def test_tokens_are_the_logs_until_a_checkpoint(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    """Many batches come between two checkpoints."""
    ledger = start()
    ledger.restore(None)
    rollouts = generate(ledger, 0)
    expected = {r.key: [*r.prompt.tolist(), *r.tokens.tolist()] for r in rollouts}
    held = [weakref.ref(r.output.token_T) for r in rollouts]
    ledger.used(0, step=1)
    del rollouts
    gc.collect()
    assert [r() for r in held] == [None] * len(held)
    ledger.commit(ledger.state(1, step=1))
    dataset = open_dataset(tmp_path / "archive")
    assert {key: dataset.payload(key).array("token_ids").tolist() for key in expected} == expected  # type: ignore[union-attr]


def test_evaluations_of_an_earlier_process(start: Callable[..., TrainerLedger]) -> None:
    ledger = start()
    first = ledger.evaluate("a", PROMPTS, SAMPLING)
    ledger = start()
    anew = ledger.evaluate("a", PROMPTS, SAMPLING, anew=True)
    assert {r.cohort for r in first + anew} == {"run.0/eval/a", "run.0/eval/a.1"}
    ledger.drop_evaluations()
    assert [c.gone for c in ledger._backend.cohorts().values()] == [2, 2]
    ledger.commit(ledger.state(0, step=0))  # nothing is let go a second time


def test_settled_before_other_weights(start: Callable[..., TrainerLedger]) -> None:
    ledger = start()
    ledger._backend.generate(PROMPTS, SamplingParams(max_tokens=200), cohort=ledger.cohort(0)).close()  # type: ignore[attr-defined]
    assert ledger.begun(0)
    ledger.settle()
    assert not ledger._backend.in_flight(ledger.cohort(0))
    assert not ledger.begun(1)


def test_state_files(tmp_path: Path) -> None:
    state = {"format": 1, "batches": 3}
    write_state(tmp_path / "checkpoint-3", state)
    write_state(tmp_path / "checkpoint-3", state | {"batches": 4}, rank=2)
    assert read_state(tmp_path / "checkpoint-3") == state
    assert read_state(tmp_path / "checkpoint-3", rank=2)["batches"] == 4
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        read_state(tmp_path)
    (tmp_path / "checkpoint-3" / STATE_FILE).write_text('{"format": 1')
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        read_state(tmp_path / "checkpoint-3")


def test_trace(start: Callable[..., TrainerLedger], tmp_path: Path) -> None:
    ledger = start()
    ledger.restore(None)
    used = generate(ledger, 0)
    facts = Facts("sums 2", ("adder",), "by domain", "1", "sum", left_out=((1, 3),))
    ledger.used(0, step=1, rewards={used[0].id: 1.5}, facts={used[0].id: facts})
    ledger.commit(ledger.state(1, step=1))
    waiting = generate(ledger, 1)
    where = ["--wal", str(tmp_path / "wal"), "--archive", str(tmp_path / "archive")]

    def show(*arguments: str) -> Any:
        result = CliRunner().invoke(trace, [*arguments, "--json"], catch_exceptions=False)
        return json.loads(result.output)

    [row] = show(used[0].key, *where)
    assert (row["step"], row["reward"], row["rollout"]) == (1, 1.5, used[0].id)
    assert row["versions"] == [[0, len(used[0].tokens)]]
    assert row["extras"]["trainer"] == "test"
    assert (row["verifier"], row["teachers"], row["router"]) == ("sums 2", ["adder"], ["by domain", "1", "sum"])
    assert row["tokens"] - row["loss_tokens"] == len(range(*slice(1, 3).indices(row["tokens"])))
    assert {r["key"] for r in show("step:1", *where)} == {r.key for r in used}
    [live] = show(str(waiting[2].id), *where[:2])
    assert (live["step"], live["tokens"], live["where"]) == (None, len(waiting[2].tokens), str(tmp_path / "wal"))
    table = CliRunner().invoke(trace, ["step:1", *where])
    assert "v0 x" in table.output
    assert "adder" in table.output
    with pytest.raises(BadInput, match="nothing is known of 'step:9'"):
        CliRunner().invoke(trace, ["step:9", *where], catch_exceptions=False)
    assert CliRunner().invoke(trace, ["step:9"]).exit_code == 2
