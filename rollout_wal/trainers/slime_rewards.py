"""Rewards as slime computes them: by a function of the user's, or by its own reward hub."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np


def load(path: str) -> Any:
    module, _, name = str(path).rpartition(".")
    return getattr(import_module(module), name)


async def reward(args: Any, groups: Sequence[Sequence[Any]]) -> None:
    """The rewards, by `--custom-rm-path` or slime's own reward hub.

    A censored sample earned none, and slime must have a number: it gets the mean of its group, which leaves the others'
    advantages over that mean as they are. It is under mask 0 itself.
    """
    path = getattr(args, "custom_rm_path", None)
    whole = bool(getattr(args, "group_rm", False))
    if path is None:
        path = f"slime.rollout.rm_hub.{'batched_async_rm' if whole else 'async_rm'}"
    function = load(path)

    async def call(what: Any) -> Any:
        value = function(args, what)
        return await value if inspect.isawaitable(value) else value

    for group in groups:
        scored = [s for s in group if s.status is not type(s.status).ABORTED]
        values = await call(scored) if whole and scored else await asyncio.gather(*(call(s) for s in scored))
        for sample, value in zip(scored, values, strict=True):
            sample.reward = value
        key = getattr(args, "reward_key", None)
        mean = float(np.mean([number(args, value) for value in values])) if scored else 0.0
        for sample in group:
            if sample.status is type(sample.status).ABORTED:
                sample.reward = {key: mean} if key else mean


def number(args: Any, reward: Any) -> float:
    key = getattr(args, "reward_key", None)
    return float(reward[key] if key else reward)
