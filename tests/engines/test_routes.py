"""Routes of mixture-of-experts models in an engine log: cut into columns, put together, over attempts and cleaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rollout_wal.engines.common.logged import read_logged
from rollout_wal.engines.common.routes import INFO, columns_of
from rollout_wal.engines.common.step_log import StepLog
from rollout_wal.log.policy import SyncPolicy

SHAPE = (48, 8)
"""48 layers with 8 experts each: more than a column of a step is wide."""


def open_log(path: Path, **options: int) -> StepLog[None]:
    return StepLog.open(
        path,
        info={INFO: list(SHAPE)},
        policy_version=0,
        weights_digest="w",
        policy=SyncPolicy("none"),
        **options,  # type: ignore[arg-type]
    )


def step(log: StepLog[None], slots: list[int], routes: np.ndarray | None) -> None:
    n = len(slots)
    log.append(
        np.array(slots, np.uint16),
        np.arange(n, dtype=np.uint32),
        np.zeros(n, np.uint8),
        np.zeros(n, np.float32),
        np.zeros(n, np.float32),
        named=None if routes is None else columns_of(routes),
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_logged_comes_back(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    routes = rng.integers(0, 256 if dtype is np.uint8 else 400, (20, 2, *SHAPE)).astype(dtype)
    log = open_log(tmp_path / "log")
    first, second = log.bind(1).slot, log.bind(2).slot
    for row in range(10):
        step(log, [second, first], routes[row, ::-1])
    # A later attempt voids what the earlier one logged behind its start.
    again = log.bind(1, start=6).slot
    for row in range(10, 20):
        step(log, [again, second], routes[row])
    expected = {1: np.concatenate((routes[:6, 0], routes[10:, 0])), 2: routes[:, 1]}
    for found in (log.logged(1), log.logged(2), *read_logged(tmp_path / "log").values()):
        assert found.routes is not None
        assert found.routes.valid_T.all()
        assert found.routes.value_T.dtype == dtype
        np.testing.assert_array_equal(found.routes.value_T, expected[found.rollout])
    log.close()


def test_what_is_missing_is_masked(tmp_path: Path) -> None:
    routes = np.full((1, *SHAPE), 7, np.uint8)
    log = open_log(tmp_path / "log")
    slot = log.bind(1).slot
    for given in (routes, None, routes):
        step(log, [slot], given)
    found = log.logged(1)
    assert found.routes is not None
    assert found.routes.valid_T.tolist() == [True, False, True]
    assert not found.routes.value_T[1].any()
    log.close()


def test_a_cleaned_log_still_has_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    routes = rng.integers(0, 64, (300, 1, *SHAPE)).astype(np.uint8)
    log = open_log(tmp_path / "log", segment_bytes=1 << 14)
    kept = log.bind(1).slot
    for row in range(40):
        step(log, [kept], routes[row])
    passing = log.bind(2).slot
    for row in range(40, 300):
        step(log, [passing], routes[row])
        if row % 10 == 0:
            log.flush()  # a batch goes into one segment
    log.release(2)
    before = len(list((tmp_path / "log").glob("*")))
    log.forget([2])
    assert len(list((tmp_path / "log").glob("*"))) < before, "nothing was cleaned: the test tests nothing"
    log.close()
    (found,) = read_logged(tmp_path / "log").values()
    assert found.routes is not None
    np.testing.assert_array_equal(found.routes.value_T, routes[:40, 0])


def test_an_engine_without_routes_has_none(tmp_path: Path) -> None:
    log: StepLog[None] = StepLog.open(tmp_path / "log", info={}, policy_version=0, weights_digest="w")
    step(log, [log.bind(1).slot], None)
    assert log.logged(1).routes is None
    log.close()
