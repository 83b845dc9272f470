"""Drawing tokens: the distribution, every filter against a plain reference, ties, and unusable logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_wal.engines.common.requests import RequestTable
from rollout_wal.errors import BackendError
from rollout_wal.params import SamplingParams
from rollout_wal.sampling import SamplingRows, draw

EOS = (3,)


def rows_for(params: list[SamplingParams], keys: list[int] | None = None, position: int = 5) -> SamplingRows:
    return SamplingRows(
        slot_N=np.arange(len(params)) + 100,
        noise_key_N=np.array(range(len(params)) if keys is None else keys, dtype=np.uint64),
        position_N=np.full(len(params), position),
        temperature_N=np.array([p.temperature for p in params], dtype=np.float64),
        top_k_N=np.array([p.top_k for p in params]),
        top_p_N=np.array([p.top_p for p in params], dtype=np.float64),
        min_p_N=np.array([p.min_p for p in params], dtype=np.float64),
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1, temperature=1.3),
    ],
    ids=["plain", "cold", "top_k", "top_p", "min_p"],
)
def test_tokens_follow_the_sampling_distribution(params: SamplingParams, plain: Any) -> None:
    """Chi-square over 40,000 draws at fixed keys, against the softmax of what the filters leave."""
    draws, vocab_size = 40_000, 24
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    drawn = draw(logits.expand(draws, -1), rows_for([params] * draws))
    probability = np.zeros(vocab_size)
    for token, logprob in {(int(t), float(lp)) for t, lp in zip(drawn.token_N, drawn.sampling_logprob_N, strict=True)}:
        probability[token] = np.exp(logprob)
    assert probability.sum() == pytest.approx(1, abs=1e-5)  # every token that could be drawn was, and no other
    expected = probability * draws
    counts = np.bincount(drawn.token_N, minlength=vocab_size)
    alive = expected > 0
    chi_square = ((counts - expected)[alive] ** 2 / expected[alive]).sum()
    degrees = int(alive.sum()) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 4
    # The probabilities are the right ones, not merely those that were drawn.
    for key in range(20):
        token, logprob, sampling_logprob = plain.draw(logits.tolist(), params, key, 5)
        assert token == drawn.token_N[key]
        assert logprob == pytest.approx(drawn.logprob_N[key], abs=1e-5)
        assert sampling_logprob == pytest.approx(drawn.sampling_logprob_N[key], abs=1e-5)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 11, 100]),
    top_p=st.sampled_from([1.0, 0.999, 0.7, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    min_tokens=st.sampled_from([0, 4]),
    stop_token_ids=st.sampled_from([(), (7,), (1, 8)]),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=6),
    seed=st.integers(0, 1 << 30),
    grid=st.sampled_from([0.0, 0.5, 1.0]),
    vocab_size=st.sampled_from([12, 48]),
)
def test_every_filter_equals_the_plain_reference(
    params: list[SamplingParams], seed: int, grid: float, vocab_size: int, plain: Any, request_of: Any
) -> None:
    """Mixed rows in one batch. A grid rounds the logits, so that ties are everywhere."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(params), vocab_size)).astype(np.float32) * 2
    if grid:
        logits = np.round(logits / grid) * np.float32(grid)
    table = RequestTable(8, EOS, 4096)
    rows, histories, keys = [], [], []
    for slot, p in enumerate(params):
        prompt, prefix = rng.integers(0, vocab_size, 3), rng.integers(0, vocab_size, rng.integers(0, 6))
        flags = rng.random(len(prefix)) < 0.7
        keys.append(int(rng.integers(0, 1 << 63)) * 2 + 1)
        request = request_of(slot, prompt, p, prefix=prefix, prefix_sampled=flags, noise_key=keys[-1])
        rows.append(table.add(request))
        sampled = [False] * 3 + flags.tolist()
        histories.append(list(zip(np.concatenate((prompt, prefix)).tolist(), sampled, strict=True)))
    drawn = draw(torch.from_numpy(logits), table.sampling_rows(np.array(rows)))
    for i, p in enumerate(params):
        expected = plain.draw(logits[i].tolist(), p, keys[i], len(histories[i]), history=histories[i], eos=EOS)
        assert int(drawn.token_N[i]) == expected[0], p
        assert drawn.logprob_N[i] == pytest.approx(expected[1], abs=1e-4)
        assert drawn.sampling_logprob_N[i] == pytest.approx(expected[2], abs=1e-4)


def test_rows_do_not_depend_on_one_another() -> None:
    params = [SamplingParams(), SamplingParams(top_k=3), SamplingParams(temperature=0), SamplingParams(top_p=0.5)] * 5
    logits = torch.randn(len(params), 400, generator=torch.Generator().manual_seed(0))
    together = draw(logits, rows_for(params, keys=list(range(20))))
    for i, p in enumerate(params):
        alone = draw(logits[i : i + 1], rows_for([p], keys=[i]))
        assert alone.token_N[0] == together.token_N[i]
        assert alone.sampling_logprob_N[0] == pytest.approx(together.sampling_logprob_N[i], abs=1e-6)


def test_greedy_takes_the_lowest_id_among_equals_and_is_certain() -> None:
    logits = torch.zeros(1, 50)
    logits[0, [17, 31, 44]] = 2.0
    drawn = draw(logits, rows_for([SamplingParams(temperature=0)]))
    assert drawn.token_N[0] == 17
    assert drawn.sampling_logprob_N[0] == 0
    assert drawn.logprob_N[0] < -0.5


@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.2), SamplingParams(temperature=0)])
def test_ties_at_the_edge_of_a_filter_keep_the_lowest_ids(params: SamplingParams) -> None:
    drawn = draw(torch.zeros(500, 10), rows_for([params] * 500))
    assert set(drawn.token_N.tolist()) == ({0} if params.temperature == 0 else {0, 1})


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.5), SamplingParams(top_k=2)],
    ids=["plain", "greedy", "top_p", "top_k"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_unusable_logits_name_slot_and_position(params: SamplingParams, value: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4 if value > 0 else slice(None)] = value
    for rows in (slice(0, 3), slice(1, 2)):
        slot = 101 - rows.start
        with pytest.raises(BackendError, match=f"slot {slot} at position 5 hold NaN"):
            draw(logits[rows], rows_for([params] * len(logits[rows])))


def test_a_row_without_any_token_left_is_an_error() -> None:
    logits = torch.zeros(2, 4)
    logits[0] = -torch.inf
    with pytest.raises(BackendError, match="slot 100 at position 5"):
        draw(logits, rows_for([SamplingParams()] * 2))
    forbidding_all = replace(
        rows_for([SamplingParams()] * 2), forbidden_E=(np.array([1, 1, 1, 1]), np.array([0, 1, 2, 3]))
    )
    with pytest.raises(BackendError, match="slot 101 at position 5"):
        draw(torch.zeros(2, 4), forbidding_all)


def test_tokens_that_the_model_rules_out_are_never_drawn() -> None:
    logits = torch.full((300, 6), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, 1.0
    assert set(draw(logits, rows_for([SamplingParams()] * 300)).token_N.tolist()) == {2, 5}
