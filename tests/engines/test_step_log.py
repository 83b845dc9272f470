"""What in-engine logging shares: the step log, the combination of attempts, and the check of versions and hooks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollout_wal.engines.base import FinishReason, Request
from rollout_wal.engines.common.logged import read_logged
from rollout_wal.engines.common.requests import RequestTable
from rollout_wal.engines.common.sampler import RowSampler
from rollout_wal.engines.common.spec import RolloutSpec, check_spec, spec_of
from rollout_wal.engines.common.step_log import StepLog
from rollout_wal.engines.common.support import Hook, Versions, check_hooks, check_version
from rollout_wal.engines.sglang.rollouts import Rollouts
from rollout_wal.engines.sglang.server_log import ServerLog
from rollout_wal.errors import BadInput, HookMoved, UndeclaredWeights, UnsupportedEngine
from rollout_wal.params import SamplingParams
from rollout_wal.sampling import draw

INFO = {"engine": "none", "engine_version": "0"}


def open_log(path: Path, version: int = 0, digest: str = "w0", **options: object) -> StepLog[str]:
    return StepLog.open(path, info=INFO, policy_version=version, weights_digest=digest, **options)  # type: ignore[arg-type]


def append(log: StepLog[str], rows: dict[int, tuple[int, int]]) -> int:
    """slot -> (token, finish)"""
    slots = np.array([*rows], np.uint16)
    tokens = np.array([t for t, _ in rows.values()], np.uint32)
    finish = np.array([f for _, f in rows.values()], np.uint8)
    return log.append(slots, tokens, finish, -tokens.astype(np.float32))


def test_outputs_leave_when_their_records_are_durable(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    bound = log.bind(7)
    append(log, {bound.slot: (3, 0)})
    log.hold("first")
    log.flush()
    append(log, {bound.slot: (4, 0)})
    log.hold("second")
    log.hold("at once", lsn=0)
    assert log.take()[0] == "first"
    log.flush()
    assert log.take() in ([], ["second", "at once"])
    assert not log.holding
    # A reader in another process sees no less than what was handed out.
    assert read_logged(tmp_path / "log")[7].token_T.tolist() == [3, 4]
    log.close()


def test_a_rollout_goes_on_from_what_is_logged_in_this_life_and_the_next(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    one, two = log.bind(1), log.bind(2)
    append(log, {one.slot: (10, 0), two.slot: (20, 0)})
    append(log, {one.slot: (11, FinishReason.EOS), two.slot: (21, 0)})
    again = log.bind(2)  # the client gave up waiting and asked again
    assert again.attempt == 2
    assert again.logged.token_T.tolist() == [20, 21]
    assert log.owner(again.slot) == (2, 2)
    append(log, {again.slot: (22, 0)})
    log.policy(5, "w5")
    append(log, {again.slot: (23, 0)})
    log.close()

    log = open_log(tmp_path / "log", 5, "w5")
    over, going = log.logged(1), log.bind(2)
    assert over.finish is FinishReason.EOS
    assert over.token_T.tolist() == [10, 11]
    assert going.attempt == 3
    assert going.logged.finish is FinishReason.RUNNING
    assert going.logged.token_T.tolist() == [20, 21, 22, 23]
    assert going.logged.version_T.tolist() == [0, 0, 0, 5]
    assert going.logged.logprob.value_T.tolist() == [-20, -21, -22, -23]
    assert not going.logged.sampling_logprob.valid_T.any()
    with pytest.raises(BadInput, match="not newer"):
        log.bind(2, 3)
    log.close()


def test_a_late_row_of_an_attempt_that_was_cut_off_is_void(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    first = log.bind(1)
    append(log, {first.slot: (1, 0)})
    append(log, {first.slot: (2, 0)})
    second = log.bind(1, 9, start=1)  # a front end that saw one token only
    append(log, {second.slot: (7, FinishReason.MAX_TOKENS)})
    assert log.logged(1).token_T.tolist() == [1, 7]
    assert log.logged(1).finish is FinishReason.MAX_TOKENS
    assert log.logged(1).attempts == 9
    log.close()


def test_a_bind_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    running = log.bind(1)
    for rollout, attempt, start in ((7, True, None), (8, 1, True), (9, 1, 1.5), (True, 2, True)):
        with pytest.raises(BadInput):
            log.bind(rollout, attempt, start=start)  # type: ignore[arg-type]
    assert log.owner(running.slot) == (1, 1)  # and not cut off by True, which equals its number
    assert log.rollouts() == [1]
    # The next ones have the slots and attempts that they would have had anyway, also in a checkpoint.
    assert [(b.slot, b.attempt) for b in (log.bind(7), log.bind(8))] == [(1, 1), (2, 1)]
    assert sorted(log._log._live) == [(1, 1), (7, 1), (8, 1)]
    with pytest.raises(BadInput):
        log.policy("5", "w5")  # type: ignore[arg-type]
    with pytest.raises(BadInput):
        log._log.engine({"name": object()})
    assert log._log._policy.version == 0  # type: ignore[union-attr]
    assert log._log._engine == INFO
    log.close()


GOOD = {"rollout": "r", "rollout_key": (1 << 64) - 1, "rollout_attempt": 1, "rollout_prefix": 2}
NOTHING = dict.fromkeys(("rollout_key", "rollout_attempt", "rollout_prefix", "rollout_observed", "rollout_release"))


def test_what_a_client_says_of_a_rollout() -> None:
    assert not check_spec({"other": 1})
    assert check_spec({**GOOD, "rollout_observed": [0, 1], "rollout_release": ["a", 3]})
    spec = spec_of({**GOOD, "rollout_observed": [0, 1], "rollout_release": ["a", 3]})
    assert spec == RolloutSpec("r", (1 << 64) - 1, 1, 2, (0, 1), ("a", 3))
    assert check_spec({"rollout": 0, **NOTHING})
    assert spec_of({"rollout": 0, **NOTHING}) == RolloutSpec(0, None, None, 0, (), ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"rollout": True},
        {"rollout": None},
        {"rollout": ""},
        {"rollout": 1 << 62},
        {"rollout_key": True},
        {"rollout_attempt": False},
        {"rollout_prefix": True},
        {"rollout_prefix": "2"},
        {"rollout_observed": [True]},
        {"rollout_observed": ["0"]},
        {"rollout_observed": 0},
        {"rollout_release": [True]},
        {"rollout_release": "name"},
        {"rollout_release": [1.0]},
    ],
    ids=str,
)
def test_what_is_no_name_and_no_number_is_refused(wrong: dict[str, object]) -> None:
    """True equals 1, and would be taken for somebody else's rollout."""
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}=.*not accepted"):
        check_spec({**GOOD, **wrong})


def test_what_an_sglang_scheduler_cannot_log_is_answered_and_does_not_end_it(tmp_path: Path) -> None:
    class Asked:
        to_finish: str | None = None
        output_ids: tuple[int, ...] = ()

        def __init__(self, rid: str, attempt: object) -> None:
            self.rid = rid
            found = SimpleNamespace(attempt=attempt, prefix=0)
            self.rollout_wal_member = SimpleNamespace(
                id=5, spec=found, found=None, rollout=None, ended=lambda: FinishReason.RUNNING, request=_request
            )

        def set_finish_with_abort(self, error_msg: str) -> None:
            self.to_finish = error_msg

    def _request(slot: int) -> Request:
        none = np.zeros(0, np.int32)
        return Request(slot, np.ones(3, np.int32), none, none.astype(np.bool_), SamplingParams(), 0)

    server = object.__new__(ServerLog)
    server.log = open_log(tmp_path / "log")  # type: ignore[assignment]
    server.rollouts = Rollouts(4, (2,), 100)
    server._running = {}
    first, second, third = Asked("a", 1), Asked("b", 1), Asked("c", True)
    assert all(server.queued(asked) for asked in (first, second, third))
    assert first.to_finish is None
    assert "not newer than attempt 1" in str(second.to_finish)
    assert "not newer than attempt 1" in str(third.to_finish)
    # The one that runs has not been cut off.
    assert server._running == {5: first}
    assert list(server.rollouts.by_rid) == ["a"]
    assert server.log is not None
    assert server.log.owner(0) == (5, 1)
    server.log.close()


def test_only_so_many_ended_rollouts_are_kept(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log", keep=2)
    for rollout in range(5):
        append(log, {log.bind(rollout).slot: (rollout, FinishReason.EOS)})
    running = log.bind(99)
    log.forget([99, 3])
    append(log, {running.slot: (1, 0)})
    log.close()
    assert sorted(read_logged(tmp_path / "log")) == [4, 99]


def test_other_weights_under_a_logged_version_are_refused(tmp_path: Path) -> None:
    open_log(tmp_path / "log", 3, "a").close()
    with pytest.raises(UndeclaredWeights, match="3"):
        open_log(tmp_path / "log", 3, "b")
    open_log(tmp_path / "log", 4, "b").close()


def test_versions_and_hooks_are_refused_by_name() -> None:
    supported = Versions("0.32", "0.34")
    for good in ("0.32", "0.32.0", "0.33.9", "0.33.1rc1+cpu"):
        check_version("engine", good, supported)
    for bad in ("0.31.9", "0.34", "0.34.0rc1", "1.0", "dev"):
        with pytest.raises(UnsupportedEngine, match=r">=0\.32,<0\.34"):
            check_version("engine", bad, supported)
    module = "rollout_wal.engines.common.step_log:StepLog"
    check_hooks("engine", "1", [Hook(f"{module}.bind", ("self", "rollout")), Hook(f"{module}.open", ("cls", "path"))])
    for hook in (Hook(f"{module}.bind", ("self", "slot")), Hook(f"{module}.gone"), Hook("rollout_wal.gone:x")):
        with pytest.raises(HookMoved):
            check_hooks("engine", "1", [hook])


def test_rows_draw_the_same_wherever_they_were_split() -> None:
    sampling = SamplingParams(
        temperature=0.8, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, min_tokens=6
    )
    prompt = np.array([5, 6, 7], np.int32)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1, 50, generator=generator)

    def run(split: int, output: list[int]) -> list[int]:
        rows = RowSampler(4, (2,), 1000)
        prefix = np.array(output[:split], np.int32)
        row = rows.add(Request(0, prompt, prefix, np.ones(split, np.bool_), sampling, 77))
        mine: list[int] = []
        for step in range(split, 12):
            rows.follow(row, [*mine[:-1], -1] if step % 3 == 0 and mine else mine)
            mine.append(int(rows.draw(logits[step], np.array([row])).token_N[0]))
        return output[:split] + mine

    whole = run(0, [])
    assert all(run(split, whole) == whole for split in range(1, 12))
    table = RequestTable(1, (2,), 1000)
    row = np.array([table.add(Request(0, prompt, prompt[:0], np.zeros(0, np.bool_), sampling, 77))])
    for step in range(12):
        token = draw(logits[step], table.sampling_rows(row)).token_N
        assert int(token[0]) == whole[step]
        table.append(row, token.astype(np.int64))
