"""What a client and an operator may ask of the plug-in, and what is refused: without a server."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from transformers import AutoTokenizer

from rollout_wal.engines.base import Request
from rollout_wal.engines.common.step_log import StepLog
from rollout_wal.engines.sglang.configuration import UNSUPPORTED, check_configuration
from rollout_wal.engines.sglang.member import Member, refusal
from rollout_wal.engines.sglang.options import Options
from rollout_wal.engines.sglang.rollouts import Drawn, Rollouts
from rollout_wal.engines.sglang.server_log import ServerLog
from rollout_wal.engines.sglang.weights import Weights
from rollout_wal.errors import BadInput
from rollout_wal.log.policy import SyncPolicy
from rollout_wal.params import SamplingParams as OurParams


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def asked(tokenizer: Any) -> Any:
    """(params, **fields) -> a request as the scheduler gets it from the front end."""

    def make(params: dict[str, Any] | None = None, **fields: Any) -> TokenizedGenerateReqInput:
        sampling = SamplingParams(**{"custom_params": {"rollout": "r"}, **(params or {})})
        sampling.normalize(tokenizer)
        given: dict[str, Any] = {
            "rid": "0",
            "input_text": "",
            "input_ids": array("q", [5, 6, 7]),
            "input_embeds": None,
            "mm_inputs": None,
            "token_type_ids": None,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "stream": False,
        }
        return TokenizedGenerateReqInput(**{**given, **fields})

    return make


def test_a_plain_rollout_is_taken(asked: Any) -> None:
    assert refusal(asked(), False) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_id": "adapter"},
        {"mm_inputs": SimpleNamespace(mm_items=["image"])},
        {"input_embeds": [[0.5]]},
        {"positional_embed_overrides": SimpleNamespace()},
        {"custom_logit_processor": "code"},
        {"session_params": SimpleNamespace()},
        {"return_routed_experts": True},
        {"return_hidden_states": True},
        {"return_indexer_topk": True},
        {"top_logprobs_num": 2},
        {"logprob_start_len": 0},
    ],
)
def test_what_no_rollout_can_have_is_refused_and_passes_without_one(asked: Any, fields: dict[str, Any]) -> None:
    (name,) = fields
    words = refusal(asked(**fields), False)
    assert words is not None
    assert f"{name} cannot be combined with a rollout id" in words
    assert f"Leave out {name}" in words
    assert refusal(asked({"custom_params": None}, **fields), False) is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"n": 2}, "n=2 with a rollout id.*under a name of its own"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias cannot be combined"),
        ({"beam_width": 2, "n": 2}, "beam_width cannot be combined"),
        ({"custom_params": {"rollout": "r", "rollout_observed": [0]}}, "outside of the prefix of 0.*begin with 0"),
        ({"custom_params": {"rollout": True}}, "rollout=True is no id"),
        ({"custom_params": {"rollout": "r", "rollout_release": [True]}}, "rollout_release=.* is no list of ids"),
    ],
)
def test_parameters_that_no_rollout_can_have(asked: Any, params: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        raise BadInput(refusal(asked(params), False))


def test_an_attempt_that_is_asked_for_twice_at_once_is_refused_before_any_rank_runs_it(
    asked: Any, tmp_path: Path
) -> None:
    server = object.__new__(ServerLog)
    server.log = StepLog.open(tmp_path / "log", info={}, policy_version=0, weights_digest="w")
    server._eos, server._max_context = (2,), 100
    requests = [asked({"custom_params": {"rollout": "r", "rollout_attempt": n}}) for n in (1, 1, 2)]
    server.pulled(requests)
    whys = [refusal(request, False) for request in requests]
    assert whys[0] is whys[2] is None
    assert "rollout_attempt=1 is not newer than attempt 1" in str(whys[1])
    server.log.close()


@pytest.mark.parametrize("stops", [{"stop": ["x"]}, {"stop": ["x", "y"]}, {"stop_regex": ["x"]}])
def test_other_stops_are_another_rollout(asked: Any, stops: dict[str, Any]) -> None:
    """What is logged has ended, or gone on, by the stops that it was asked for with."""

    def number(params: dict[str, Any]) -> int:
        return Member(asked(params), (2,), 100).id

    others = [{}, {"stop": ["x"]}, {"stop": ["x", "y"]}, {"stop_regex": ["x"]}]
    assert number(stops) == number(stops)
    assert [other for other in others if number(other) == number(stops)] == [stops]


@pytest.mark.parametrize(
    "change",
    [
        {"speculative_algorithm": "EAGLE"},
        {"disaggregation_mode": "decode"},
        {"pp_size": 2},
        {"dllm_algorithm": "LowConfidence"},
        {"enable_mixed_chunk": True},
    ],
)
def test_a_server_that_samples_elsewhere_is_refused(change: dict[str, Any]) -> None:
    scheduler = SimpleNamespace(server_args=SimpleNamespace(**change), rust_server=None)
    (name,) = change
    with pytest.raises(BadInput, match=f"runs with {name}=.*Leave {name} out, or unset THE_VARIABLE"):
        check_configuration(scheduler, "THE_VARIABLE")


def test_the_rust_front_end_is_refused() -> None:
    scheduler = SimpleNamespace(server_args=SimpleNamespace(), rust_server=object())
    with pytest.raises(BadInput, match="Unset SGLANG_RUST_SERVER"):
        check_configuration(scheduler, "THE_VARIABLE")


def test_what_is_refused_is_what_sglang_calls_it_and_its_defaults_pass() -> None:
    """A field that SGLang renames would be let through."""
    defaults = ServerArgs(model_path="dummy")
    assert [name for name in UNSUPPORTED if not hasattr(defaults, name)] == []
    check_configuration(SimpleNamespace(server_args=defaults, rust_server=None), "THE_VARIABLE")


def test_options_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_WAL_SGLANG_LOG", "runs/wal")
    assert Options.from_environment() == Options(Path("runs/wal"), 0, 10_000, 64 << 20, SyncPolicy(), False)
    for name, value in {
        "POLICY_VERSION": "17",
        "KEEP": "5",
        "SEGMENT_BYTES": "1048576",
        "GROUP_MS": "20",
        "TAKE_OVER": "1",
    }.items():
        monkeypatch.setenv(f"ROLLOUT_WAL_SGLANG_{name}", value)
    assert Options.from_environment() == Options(Path("runs/wal"), 17, 5, 1 << 20, SyncPolicy("group", 20), True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("POLICY_VERSION", "v1", "is not a number of 0..*Set it to digits"),
        ("KEEP", "-1", "is not a number"),
        ("SEGMENT_BYTES", "100", "is not a number of 65536"),
        ("TAKE_OVER", "yes", "is not a number of 0..1"),
        ("KEEPS", "5", "unknown environment variables .*known are"),
    ],
)
def test_options_that_cannot_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv("ROLLOUT_WAL_SGLANG_LOG", "runs/wal")
    monkeypatch.setenv(f"ROLLOUT_WAL_SGLANG_{name}", value)
    with pytest.raises(BadInput, match=words) as raised:
        Options.from_environment()
    assert f"ROLLOUT_WAL_SGLANG_{name}" in str(raised.value)


def test_a_token_that_a_retraction_took_back_is_not_of_the_old_weights(model: Path) -> None:
    """With overlapped steps a request that is retracted loses the token on its way, which is then drawn anew."""
    rollouts = Rollouts(8, (2,), 100)
    said: list[int] = []
    weights = Weights(model, 0, "w0", rollouts, lambda version, digest, source: said.append(version))
    empty = np.empty(0, np.int32)
    for rid, retracted in (("runs", False), ("waits", True)):
        request = Request(0, np.array([5], np.int32), empty, empty.astype(np.bool_), OurParams(), 0)
        req = SimpleNamespace(is_retracted=retracted, output_ids=[6, 7], weight_version_events=[])
        rollouts.add(rid, request, req).drawn.append(Drawn(3, 8, -1.0, -1.0, 0))
    weights.updated("1", "", True)
    spans = {rid: [e.num_output_tokens for e in r.req.weight_version_events] for rid, r in rollouts.by_rid.items()}
    assert spans == {"runs": [3], "waits": []}
    assert said == []  # the step that is on its way is of version 0
    weights.logging(1)
    assert said == [1]
