"""What needs no engine: which request is which rollout, what is refused, and that another vLLM is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from vllm import SamplingParams as VllmParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core import EngineCore

from rollout_wal.engines.common.spec import RolloutSpec, named
from rollout_wal.engines.vllm import weights
from rollout_wal.engines.vllm.rollout import Rollout
from rollout_wal.engines.vllm.rows import append_step
from rollout_wal.errors import BadInput

SPEC = RolloutSpec("r", 7, None, 0, (), ())


def rollout(spec: RolloutSpec = SPEC, request: dict[str, Any] | None = None, **params: Any) -> Rollout:
    fields: dict[str, Any] = {
        "client_index": 0,
        "request_id": "1",
        "prompt_token_ids": [1, 2, 3],
        "sampling_params": VllmParams(max_tokens=5, **params),
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_is_token_ids": None,
        **(request or {}),
    }
    return Rollout(spec, cast(Any, SimpleNamespace(**fields)), (0,), 100)


def test_a_rollout_of_an_older_log_is_found_again() -> None:
    assert rollout().id == 4743282956776858854


def test_what_changes_the_distribution_makes_another_rollout() -> None:
    limits: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"logit_bias": {5: 1.0}},
        {"logit_bias": {5: 2.0}},
        {"allowed_token_ids": [4, 5]},
        {"allowed_token_ids": [4, 6]},
        {"bad_words": ["a"]},
        {"bad_words": ["b"]},
    ]
    numbers = [rollout(**p).id for p in limits]
    assert len(set(numbers)) == len(limits)
    assert named(numbers, ["r"]) == numbers
    assert rollout(allowed_token_ids=[5, 4]).id == rollout(allowed_token_ids=[4, 5]).id


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        ({"lora_request": object()}, "a LoRA adapter"),
        ({"mm_features": [object()]}, "multimodal inputs"),
        ({"prompt_embeds": object(), "prompt_token_ids": None}, "prompt embeddings"),
        ({"prompt_embeds": object(), "prompt_is_token_ids": [True, False, True]}, "prompt embeddings"),
    ],
)
def test_prompts_that_are_more_than_token_ids_are_refused(request_: dict[str, Any], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        rollout(request=request_)


def test_a_token_that_was_not_drawn_is_not_logged() -> None:
    class Log:
        tokens: list[int]

        def append(self, slots: Any, tokens: Any, *_: Any, **__: Any) -> None:
            self.tokens = tokens.tolist()

    log, good, bad = Log(), rollout(), rollout(RolloutSpec("other", 8, None, 0, (), ()))
    good.slot, bad.slot = 0, 1
    draws = SimpleNamespace(find=lambda slot, position: (40 + slot, -0.5))
    lists = SimpleNamespace(logprobs=np.array([[-0.5]], np.float32))
    rows = [
        (EngineCoreOutput("good", [40], new_logprobs=cast(Any, lists)), good),
        (EngineCoreOutput("bad", [77], new_logprobs=cast(Any, lists)), bad),
    ]
    ((output, refused, why),) = append_step(cast(Any, log), rows, cast(Any, draws))
    assert (output.request_id, refused) == ("bad", bad)
    assert "took token 77 for rollout 'other', and 41 was drawn" in why
    assert log.tokens == [40]


def test_whatever_may_replace_weights_is_told_before_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Told(weights.WatchesWeights):
        def weights_touched(self, by: str) -> None:
            told.append(by)

        def policy_changed(self, version: str) -> None:
            told.append(version)

    for name in ("collective_rpc", "sleep", "set_weight_version"):
        original = getattr(EngineCore, name)
        monkeypatch.setattr(EngineCore, name, getattr(original, "__wrapped__", original))
    weights.watch()
    weights.watch()  # of a second scheduler in this process: it is told once all the same
    core = EngineCore.__new__(EngineCore)
    core.scheduler = cast(Any, Told())
    core.model_executor = cast(Any, SimpleNamespace(collective_rpc=lambda method, *_: [method]))
    assert core.collective_rpc("check_health") == ["check_health"]
    assert told == []
    core.collective_rpc("update_weights", kwargs={})
    core.collective_rpc(len)
    core.set_weight_version("3")
    for level in (1, 2):
        with pytest.raises(AttributeError):  # the rest of the engine core is not there
            core.sleep(level)
    assert told == ["update_weights", "a function that was called on the workers", "3", "sleep(level=2)"]


@pytest.mark.parametrize("module", ["scheduler", "processor", "engine", "weights"])
def test_another_vllm_is_refused_before_anything_of_it_is_missed(module: str, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text('__version__ = "0.99.0"\n')
    done = subprocess.run(
        [sys.executable, "-c", f"import rollout_wal.engines.vllm.{module}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "vLLM 0.99.0 is installed; this version of rollout-wal supports vLLM >=0.32.0,<0.33" in done.stderr
