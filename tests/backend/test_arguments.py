"""What callers pass besides Python's own types: taken as what it is, or refused before anything is logged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rollout_wal.backend import RolloutBackend
from rollout_wal.errors import BadInput, BadSampling, CohortMismatch, UnknownRollout
from rollout_wal.params import SamplingParams

SAMPLING = SamplingParams(max_tokens=12, stop_token_ids=(5, 6), temperature=0.5)
SAME = SamplingParams(
    max_tokens=np.int64(12),
    stop_token_ids=np.array([5, 6]),  # type: ignore[arg-type]
    temperature=np.float32(0.5),
)


def test_numpys_numbers_make_the_same_cohort(running: RolloutBackend, prompts: Any) -> None:
    first = list(running.generate(prompts[:2], SAMPLING, group_size=2, seed=3, cohort="same"))
    again = list(
        running.generate(
            np.asarray(prompts[:2]),
            SAME,
            group_size=np.int64(2),
            seed=np.int64(3),
            cohort="same",  # type: ignore
        )
    )
    assert {r.id for r in again} == {r.id for r in first}
    with pytest.raises(CohortMismatch):
        running.generate(prompts[:2], SAMPLING, group_size=2, seed=4, cohort="same")
    running.release(r.id for r in first)


@pytest.mark.parametrize(
    "wrong", [{"seed": 1.5}, {"seed": "1"}, {"group_size": 2.0}, {"group_size": True}, {"cohort": "\ud800"}]
)
def test_a_refused_call_leaves_no_cohort_behind(running: RolloutBackend, prompts: Any, wrong: dict[str, Any]) -> None:
    before = running.cohorts()
    with pytest.raises(BadInput):
        running.generate(prompts, SAMPLING, **{"cohort": "refused", **wrong})
    assert running.cohorts() == before


def test_what_cannot_be_begun_leaves_no_cohort_behind(running: RolloutBackend, prompts: Any) -> None:
    """A value that slipped through is found when the first of them is encoded, and not behind the cohort's record."""
    sampling = SamplingParams(max_tokens=12)
    object.__setattr__(sampling, "max_tokens", np.int64(12))
    with pytest.raises(BadInput, match="cannot be logged"):
        running.generate(prompts, sampling, cohort="later")
    assert "later" not in running.cohorts()
    rollouts = list(running.generate(prompts, SamplingParams(max_tokens=12), cohort="later"))
    assert len(rollouts) == len(prompts)
    running.release(r.id for r in rollouts)


def nested(depth: int) -> dict[str, Any]:
    inner: Any = 1
    for _ in range(depth - 1):
        inner = [inner]
    return {"nested": inner}


@pytest.mark.parametrize("depth", [101, 1022, 1023, 100_000])
def test_metadata_that_is_nested_too_deeply_is_refused_at_once(
    running: RolloutBackend, prompts: Any, depth: int
) -> None:
    with pytest.raises(BadInput, match=r"the metadata .* cannot be logged"):
        running.generate(prompts[:1], SAMPLING, metadata=[nested(depth)], cohort="deep")
    assert "deep" not in running.cohorts()


def test_metadata_may_be_nested(running: RolloutBackend, prompts: Any) -> None:
    (rollout,) = running.generate(prompts[:1], SAMPLING, metadata=[nested(100)], cohort="nested")
    assert rollout.metadata == nested(100)
    running.release([rollout.id])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "12"),
        ("max_tokens", 12.5),
        ("top_k", None),
        ("temperature", "0.5"),
        ("temperature", float("nan")),
        ("ignore_eos", "yes"),
        ("stop", "no sequence"),
        ("stop", (b"x",)),
        ("stop_token_ids", 5),
        ("stop_token_ids", (5.5,)),
    ],
)
def test_sampling_parameters_of_another_type_are_named(name: str, value: Any) -> None:
    with pytest.raises(BadSampling, match=f"{name}="):
        SamplingParams(**{name: value})


def test_sampling_parameters_are_plain() -> None:
    assert SAME == SAMPLING
    assert repr(SAME.to_dict()) == repr(SAMPLING.to_dict())
    odd = SamplingParams(temperature=1, top_k=5.0, ignore_eos=np.True_, stop=["a", np.str_("b")])  # type: ignore
    assert repr(odd) == repr(SamplingParams(temperature=1.0, top_k=5, ignore_eos=True, stop=("a", "b")))
    assert SamplingParams.from_dict(odd.to_dict()) == odd


def test_numpys_ids_are_consumed_and_let_go(running: RolloutBackend, prompts: Any) -> None:
    rollouts = list(running.generate(prompts, SAMPLING, seed=11, cohort="ids"))
    ids = np.array([r.id for r in rollouts])
    for epoch, step in ((1.0, 0), (0, True), (None, 0), (0, "1")):
        with pytest.raises(BadInput, match="whole number"):
            running.consumed(ids, epoch=epoch, step=step)  # type: ignore[arg-type]
    for wrong in ([1.0], [True], ["1"], [None]):
        with pytest.raises(BadInput, match="whole number"):
            running.release(wrong)  # type: ignore[arg-type]
    assert len(running.members("ids")) == len(prompts)
    running.consumed(ids[:2], epoch=np.int64(0), step=np.uint8(3), release=False)  # type: ignore[arg-type]
    running.consumed(ids, epoch=0, step=3)
    with pytest.raises(UnknownRollout):
        running.release(ids)
    assert not running.members("ids")
    assert len(list(running.generate(prompts, SAMPLING, seed=12))) == len(prompts), "workers were told what they read"


def test_an_abort_for_a_reason_that_cannot_be_logged_changes_nothing(running: RolloutBackend, prompts: Any) -> None:
    iterator = running.generate(prompts, SamplingParams(max_tokens=1500, ignore_eos=True), cohort="aborted")
    ids = np.array(running.in_flight("aborted"))
    for reason in (None, 7, "\ud800"):
        with pytest.raises(BadInput, match="Censor"):
            running.abort(ids[0], reason=reason)  # type: ignore[arg-type]
    assert ids[0] in running.in_flight("aborted")
    for rollout in ids:
        running.abort(rollout, reason="enough")
    rollouts = list(iterator)
    assert {r.censored for r in rollouts} == {"enough"}
    running.release(r.id for r in rollouts)
