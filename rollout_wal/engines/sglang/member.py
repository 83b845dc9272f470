"""A request of SGLang's that is a rollout: what its client asked for, and what the log adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...finish import finish_reason
from ...params import SamplingParams
from ..base import FinishReason, Request
from ..common.logged import Logged
from ..common.spec import RolloutSpec, check_spec, noise_key, not_accepted, rollout_id, spec_of
from .rollouts import Rollout

#: Keys that the rank with the log adds to a request before the others see it: see `Found`.
OWN: Final = (
    "rollout_wal_tokens",
    "rollout_wal_logprobs",
    "rollout_wal_versions",
    "rollout_wal_finish",
    "rollout_wal_no",
)
#: What SGLang's top_k is where nothing is filtered.
_ALL: Final = 1 << 30
_GRAMMAR: Final = "its grammar's state is not restored on resume"
_REFUSED_PARAMS: Final = {
    "json_schema": _GRAMMAR,
    "regex": _GRAMMAR,
    "ebnf": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "logit_bias": "the project's draw does not know it",
    "watermark": "it replaces the draw",
}
_IDS_ONLY: Final = "a rollout is known by its token ids, and a resume has nothing else"
_NOT_LOGGED: Final = "they are not logged, so a resume could not return them"
_REFUSED_REQUEST: Final = {
    "custom_logit_processor": "the project's draw does not know it",
    "input_embeds": _IDS_ONLY,
    "positional_embed_overrides": _IDS_ONLY,
    "mm_inputs": _IDS_ONLY,
    # Neither the rollout's id nor the policy version tells adapters apart.
    "lora_id": "the log knows the weights by the server's policy version, and an adapter has none",
    "session_params": "a resume needs the whole prompt",
    "return_sampling_mask": "it describes SGLang's own draw",
    "top_logprobs_num": _NOT_LOGGED,
    "token_ids_logprob": _NOT_LOGGED,
    "return_hidden_states": _NOT_LOGGED,
    "return_routed_experts": _NOT_LOGGED,
    "return_indexer_topk": _NOT_LOGGED,
}


def refusal(recv_req: Any, deterministic: bool) -> str | None:
    """Why a request cannot be honoured, or None.

    Args:
        deterministic: whether SGLang honours `sampling_seed` by itself.
    """
    params = recv_req.sampling_params
    try:
        named = check_spec(params.custom_params or {}, own=OWN)
    except ValueError as error:
        return str(error)
    if not named:
        if params.sampling_seed is not None and not deterministic:
            return not_accepted(
                "sampling_seed is silently ignored by this server: it needs --enable-deterministic-inference",
                "Name a rollout in custom_params, whose noise is keyed by position, or leave the seed out",
            )
        return None
    if (found := next(_combined(recv_req), None)) is not None:
        field, why = found
        return not_accepted(
            f"{field} cannot be combined with a rollout id: {why}", f"Leave out {field}, or the rollout id"
        )
    # SGLang copies the request with its name: each copy would cut off the one before it.
    if params.n > 1:
        return not_accepted(
            f"n={params.n} with a rollout id: each completion is a rollout",
            "Send a request for each, under a name of its own",
        )
    if why := params.custom_params.get("rollout_wal_no"):
        return str(why)
    spec = spec_of(params.custom_params)
    assert spec is not None
    if not 0 <= spec.prefix < len(recv_req.input_ids):
        return not_accepted(
            f"rollout_prefix={spec.prefix} leaves no prompt: the request has {len(recv_req.input_ids)} tokens",
            "Send the prompt with the prefix after it, and count only the prefix",
        )
    if any(not 0 <= at < spec.prefix for at in spec.observed):
        return not_accepted(
            f"rollout_observed names tokens outside of the prefix of {spec.prefix}",
            "Pass indexes into the prefix, which begin with 0",
        )
    return None


def _combined(recv_req: Any) -> Iterator[tuple[str, str]]:
    """What a request has that no rollout can have, and why."""
    params = recv_req.sampling_params
    for where, refused in ((params, _REFUSED_PARAMS), (recv_req, _REFUSED_REQUEST)):
        for field, why in refused.items():
            if getattr(where, field, None) not in (None, False, 0, "", [], {}):
                yield field, why
    if (params.beam_width or 1) > 1:
        yield "beam_width", "beams are not sampled"
    if recv_req.return_logprob and recv_req.logprob_start_len >= 0:
        yield "logprob_start_len", "after a resume the prompt holds output"


def sampling_of(params: Any) -> SamplingParams:
    """SGLang's parameters as the project's. Its greedy requests have top_k 1 instead of temperature 0."""
    top_k = 0 if params.top_k >= _ALL or params.top_k < 0 else params.top_k
    count = params.max_new_tokens if params.max_new_tokens is not None else 1 << 30
    return SamplingParams(
        temperature=0.0 if top_k == 1 else params.temperature,
        top_k=top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        max_tokens=max(1, count),
        min_tokens=min(params.min_new_tokens, max(1, count)),
        stop_token_ids=tuple(sorted(params.stop_token_ids or ())),
        stop=tuple(params.stop_strs or ()),  # SGLang looks for them; here they are a part of what the rollout is
        ignore_eos=params.ignore_eos,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )


@dataclass(frozen=True, slots=True)
class Found:
    """What is logged of a rollout that a client asks for.

    It travels with the request, as plain lists: one rank of a tensor-parallel group has the log, and all of them must
    schedule the same.
    """

    tokens: list[int]
    logprobs: list[float | None]
    versions: list[int]
    finish: FinishReason

    @classmethod
    def of(cls, logged: Logged) -> Found:
        values, valid = logged.logprob.value_T.tolist(), logged.logprob.valid_T.tolist()
        return cls(
            logged.token_T.tolist(),
            [v if ok else None for v, ok in zip(values, valid, strict=True)],
            logged.version_T.tolist(),
            logged.finish,
        )

    def attach(self, params: Any) -> None:
        params.custom_params = {
            **params.custom_params,
            **dict(zip(OWN, (self.tokens, self.logprobs, self.versions, int(self.finish)), strict=False)),
        }

    @classmethod
    def attached(cls, extra: Mapping[str, Any]) -> Found | None:
        if OWN[0] not in extra:
            return None
        tokens, logprobs, versions, finish = (extra[key] for key in OWN[:4])
        return cls(tokens, logprobs, versions, FinishReason(finish))


class Member:
    """Made when the request arrives; `rollout` is set once it has a slot in the log."""

    def __init__(self, recv_req: Any, eos_token_ids: tuple[int, ...], max_context: int) -> None:
        params = recv_req.sampling_params
        extra: Mapping[str, Any] = params.custom_params
        spec = spec_of(extra)
        assert spec is not None
        self.spec: RolloutSpec = spec
        tokens = np.array(recv_req.input_ids, np.int32)
        cut = len(tokens) - spec.prefix
        self.prompt, self.prefix = tokens[:cut], tokens[cut:]
        self.sampled = np.ones(spec.prefix, np.bool_)
        self.sampled[list(spec.observed)] = False
        self.sampling = sampling_of(params)
        self.key = noise_key(spec, params.sampling_seed)
        # What is logged has ended by these, or gone on: asked for with others, it is another rollout.
        patterns = {"stop_regex": list(params.stop_regex_strs)} if params.stop_regex_strs else None
        self.id = rollout_id(spec.name, self.prompt.tolist(), self.sampling, self.key, patterns)
        self.found = Found.attached(extra)
        self.eos = eos_token_ids
        self.max_context = max_context
        self.rollout: Rollout | None = None
        self.cut_off = False
        """Another request has taken the rollout over; this one ends without being logged."""

    def request(self, slot: int) -> Request:
        return Request(slot, self.prompt, self.prefix, self.sampled, self.sampling, self.key)

    def ended(self) -> FinishReason:
        """Why what is logged of it is over, or RUNNING: its flag, or the finish predicate over its tokens."""
        if self.found is None or self.found.finish is not FinishReason.RUNNING:
            return self.found.finish if self.found is not None else FinishReason.RUNNING
        return finish_reason(
            self.found.tokens[-1],
            sampled=len(self.found.tokens),
            length=len(self.prompt) + len(self.found.tokens),
            sampling=self.sampling,
            eos_token_ids=self.eos,
            max_context=self.max_context,
        )


def neutralise(params: Any) -> None:
    """Have SGLang leave the logits alone: greedy, without penalties, and nothing forbidden. The draw is ours."""
    params.temperature, params.top_k, params.top_p, params.min_p = 1.0, 1, 1.0, 0.0
    params.repetition_penalty, params.presence_penalty, params.frequency_penalty = 1.0, 0.0, 0.0
    params.min_new_tokens, params.sampling_seed = 0, None
