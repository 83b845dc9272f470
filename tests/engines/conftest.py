"""Tiny models, and the independent sampler and unbatched run to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout_wal.engines.base import Request
from rollout_wal.params import SamplingParams
from rollout_wal.testing.plain_sampler import Unbatched, plain_draw, plain_gumbel, plain_philox
from rollout_wal.testing.tiny_models import make_tiny_model


@dataclass(frozen=True)
class Sampler:
    """The independent implementations, for tests: modules here cannot import one another."""

    philox: Callable[..., list[int]] = plain_philox
    gumbel: Callable[..., float] = plain_gumbel
    draw: Callable[..., tuple[int, float, float]] = plain_draw


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plain() -> Sampler:
    return Sampler()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny model; made once per set of arguments."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(architecture: str = "llama", **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[key] = make_tiny_model(folder, architecture, **options)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(scope="session")
def unbatched() -> Callable[[Path], Unbatched]:
    def get(folder: Path) -> Unbatched:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return Unbatched(model.eval(), (model.config.eos_token_id,))

    return get


@pytest.fixture(scope="session")
def request_of() -> Callable[..., Request]:
    """A request from plain lists; the prefix counts as sampled unless flags say otherwise."""

    def make(
        slot: int,
        prompt: Any,
        sampling: SamplingParams | None = None,
        *,
        prefix: Any = (),
        prefix_sampled: Any = None,
        noise_key: int = 0,
    ) -> Request:
        flags = np.ones(len(prefix), bool) if prefix_sampled is None else np.asarray(prefix_sampled, dtype=bool)
        return Request(
            slot,
            np.asarray(prompt, dtype=np.int32),
            np.asarray(prefix, dtype=np.int32),
            flags,
            sampling or SamplingParams(),
            noise_key,
        )

    return make
