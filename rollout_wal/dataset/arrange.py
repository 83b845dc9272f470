"""From packed bins to steps and ranks, so that every rank of a step has as many tokens as the others.

Shape legend: N = samples, M = bins, S = steps, R = ranks, P = bins per rank and step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .packing import least_loaded

#: Most tokens of a rank over the mean of all ranks of a step: what is aimed at.
IMBALANCE_AIM = 1.02
#: Bins are told apart by fill only this finely, so that which of two full ones comes first is left to chance.
_FILL_CLASS = 0.005


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where bins and samples went.

    Args:
        bin_N: int32 [N], the bin of each sample, renumbered: step * R * P + rank * P + place.
        steps: number of steps.
        imbalance_S: float64 [S], max over mean of the tokens per rank.
    """

    bin_N: NDArray[np.int32]
    steps: int
    imbalance_S: NDArray[np.float64]


def arrange(
    lengths_N: NDArray[np.int64],
    bin_N: NDArray[np.int32],
    order_key_N: NDArray[np.int32],
    chance_M: NDArray[np.uint64],
    *,
    capacity: int,
    ranks: int,
    bins_per_rank: int,
    may_spread: bool,
    whole_steps: bool = False,
) -> Arrangement:
    """Group bins of like fill into steps, in random order, and deal each step's bins out to the ranks.

    Bins that are left over, or that make a step uneven, are taken apart and their samples spread evenly.

    Args:
        lengths_N: tokens of each sample.
        bin_N: the bin of each, numbered without gaps.
        order_key_N: bins of a rank are ordered by the least key of their samples (the teacher).
        chance_M: a random number for each bin.
        capacity: of a bin; bins above it (a sample longer than the budget) stay by themselves.
        may_spread: False: no bin is taken apart.
        whole_steps: bins are numbered step by step already, and stay in their step.
    """
    per_step = ranks * bins_per_rank
    bins = len(chance_M)
    tokens_M = np.bincount(bin_N, weights=lengths_N, minlength=bins).astype(np.int64)
    oversize = np.flatnonzero(tokens_M > capacity)
    blocks = [_padded(oversize[np.argsort(-tokens_M[oversize], kind="stable")], per_step)]
    fitting = np.flatnonzero(tokens_M <= capacity)

    if whole_steps:
        blocks = [np.arange(bins, dtype=np.int64).reshape(-1, per_step)]
    elif may_spread:
        even, spread = _even_out(lengths_N, bin_N, tokens_M, chance_M, fitting, capacity, ranks, per_step)
        blocks += [even, spread.blocks_SW]
        bin_N, tokens_M, bins = spread.bin_N, spread.tokens_M, len(spread.tokens_M)
    else:
        blocks.append(_padded(_by_fill(fitting, tokens_M, chance_M, capacity), per_step))
    blocks_SW = np.concatenate(blocks)

    # A step's place in the epoch is by chance too, whatever its fill.
    first = blocks_SW.max(axis=1, initial=-1)
    blocks_SW = blocks_SW[np.argsort(np.resize(chance_M, bins)[first], kind="stable")]

    dealt_SRP = _deal(blocks_SW, tokens_M, ranks)
    key_M = np.full(bins, np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(key_M, bin_N, order_key_N)
    by_key = np.argsort(np.where(dealt_SRP >= 0, key_M[dealt_SRP], np.iinfo(np.int32).max), axis=2, kind="stable")
    dealt_SRP = np.take_along_axis(dealt_SRP, by_key, axis=2)

    number_M = np.zeros(bins + 1, dtype=np.int32)
    number_M[dealt_SRP.ravel()] = np.arange(dealt_SRP.size, dtype=np.int32)
    return Arrangement(number_M[bin_N], len(blocks_SW), _imbalance(blocks_SW, tokens_M, ranks))


def _even_out(
    lengths_N: NDArray[np.int64],
    bin_N: NDArray[np.int32],
    tokens_M: NDArray[np.int64],
    chance_M: NDArray[np.uint64],
    fitting: NDArray[np.int64],
    capacity: int,
    ranks: int,
    per_step: int,
) -> tuple[NDArray[np.int64], _Spread]:
    """Blocks of like bins that stay as they are, and what was spread so that every step is even."""
    # Neighbours in fill make even steps, but for the few bins that packing could not fill.
    neighbours = _padded(_by_fill(fitting, tokens_M, chance_M, capacity), per_step)
    uneven = neighbours[_imbalance(neighbours, tokens_M, ranks) > IMBALANCE_AIM]
    tokens = tokens_M[uneven]
    odd = uneven[(uneven >= 0) & (tokens * IMBALANCE_AIM < tokens.max(axis=1, keepdims=True, initial=0))]

    # Those are taken apart and spread evenly, with what else does not fill a step. A step in which a rank has one long
    # sample cannot be evened out, so company is drawn, by chance, from bins without such samples: whole steps of them.
    longest_M = np.zeros(len(tokens_M), dtype=np.int64)
    np.maximum.at(longest_M, bin_N, lengths_N)
    others = np.setdiff1d(fitting, odd)
    hard = np.where(longest_M[others] > capacity // 2, longest_M[others], 0)
    easiest_first = others[np.lexsort((chance_M[others], hard))]
    rest = len(others) % per_step
    for extra in (1, 2, 4, 8) if rest or len(odd) else (0,):
        company, body = np.split(easiest_first, [min(rest + extra * per_step, len(others))])
        spread = _spread(lengths_N, bin_N, np.concatenate([odd, company]), len(tokens_M), capacity, per_step)
        if _imbalance(spread.blocks_SW, spread.tokens_M, ranks).max(initial=1.0) <= IMBALANCE_AIM:
            break
    return _padded(_by_fill(body, tokens_M, chance_M, capacity), per_step), spread


def _by_fill(
    bins: NDArray[np.int64], tokens_M: NDArray[np.int64], chance_M: NDArray[np.uint64], capacity: int
) -> NDArray[np.int64]:
    """The bins from full to empty; by chance where they are equally full, give or take `_FILL_CLASS`."""
    fill_class = np.floor((capacity - tokens_M[bins]) / (_FILL_CLASS * capacity)).astype(np.int64)
    return bins[np.lexsort((chance_M[bins], fill_class))]


def _deal(blocks_SW: NDArray[np.int64], tokens_M: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """int64 [S, R, P]: each step's bins dealt out like cards, fullest first and turning round at each row; -1: none."""
    load = np.where(blocks_SW >= 0, tokens_M[blocks_SW], -1)
    dealt = np.take_along_axis(blocks_SW, np.argsort(-load, axis=1, kind="stable"), axis=1)
    dealt_SPR = dealt.reshape(len(blocks_SW), blocks_SW.shape[1] // ranks, ranks)
    dealt_SPR[:, 1::2] = dealt_SPR[:, 1::2, ::-1].copy()
    return dealt_SPR.transpose(0, 2, 1)


def _imbalance(blocks_SW: NDArray[np.int64], tokens_M: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    """float64 [S]: max over mean tokens per rank if the bins of each step are dealt out."""
    dealt_SRP = _deal(blocks_SW, tokens_M, ranks)
    loads_SR = np.where(dealt_SRP >= 0, tokens_M[dealt_SRP], 0).sum(axis=2)
    if not len(loads_SR):
        return np.zeros(0)
    return np.asarray(loads_SR.max(axis=1) / np.maximum(loads_SR.mean(axis=1), 1e-9), dtype=np.float64)


def _padded(bins: NDArray[np.int64], per_step: int) -> NDArray[np.int64]:
    """int64 [S, per_step]: bins in their order, the last step filled up with -1."""
    steps = -(-len(bins) // per_step)
    out = np.full(steps * per_step, -1, dtype=np.int64)
    out[: len(bins)] = bins
    return out.reshape(-1, per_step)


@dataclass(frozen=True, slots=True)
class _Spread:
    bin_N: NDArray[np.int32]
    tokens_M: NDArray[np.int64]
    blocks_SW: NDArray[np.int64]


def _spread(
    lengths_N: NDArray[np.int64],
    bin_N: NDArray[np.int32],
    pool: NDArray[np.int64],
    bins: int,
    capacity: int,
    per_step: int,
) -> _Spread:
    """Take the bins of a pool apart and spread their samples evenly over as few whole steps as hold them."""
    in_pool = np.zeros(bins, dtype=np.bool_)
    in_pool[pool] = True
    items = np.flatnonzero(in_pool[bin_N])
    lengths = lengths_N[items]
    out = bin_N.copy()
    # Samples so long that only best fit gets them in stay where they are.
    blocks = _padded(pool, per_step)
    for steps in range(-(-int(lengths.sum()) // (per_step * capacity)), len(blocks) + 1):
        spread = least_loaded(lengths, steps * per_step, capacity) if steps else None
        if spread is not None:
            out[items] = bins + spread
            tokens = np.bincount(spread, weights=lengths, minlength=steps * per_step)
            blocks = (bins + np.argsort(-tokens, kind="stable")).reshape(-1, per_step)
            bins += steps * per_step
            break
    return _Spread(out, np.bincount(out, weights=lengths_N, minlength=bins).astype(np.int64), blocks)
