"""A request of vLLM that is a rollout: what was asked for, how far it is, what is logged of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine import FinishReason as VllmFinish
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request as VllmRequest

from ...errors import BadInput, problem
from ...finish import finish_reason
from ...params import SamplingParams
from ..base import FinishReason, Request
from ..common.logged import Logged
from ..common.routes import Routes
from ..common.spec import not_accepted
from .draws import PLAN, Draws, plan_of
from .outputs import FINISH, Outputs, single
from .request import RolloutSpec, limits_of, noise_key, rollout_id, sampling_of


class Rollout:
    """See the module.

    Args:
        spec: what the client says of it.
        request: as the client sent it; nothing of it is changed before `go_on_from` and `prepare`.
        eos, max_context: of the model.

    Raises:
        BadInput: a prefix that is not part of the prompt, or a prompt that is more than token ids.
    """

    def __init__(self, spec: RolloutSpec, request: VllmRequest, eos: tuple[int, ...], max_context: int) -> None:
        _check_prompt(spec, request)
        params = request.sampling_params
        self.client: int = request.client_index
        self.name: str = request.request_id
        self.spec = spec
        self.wants_logprobs = params.logprobs is not None
        self.sampling: SamplingParams = sampling_of(params)
        self._eos = eos
        self._max_context = max_context
        self._prompt: list[int] = list(request.prompt_token_ids or ())
        self._key = noise_key(spec, params.seed)
        self.id = rollout_id(spec.name, self._prompt, self.sampling, self._key, limits_of(params))
        self._cut = len(self._prompt) - spec.prefix
        if not self._cut > 0 or any(not 0 <= i < spec.prefix for i in spec.observed):
            raise BadInput(
                not_accepted(
                    f"{spec.prefix} of the {len(self._prompt)} prompt tokens of rollout {spec.name!r} are output",
                    "Submit token ids, at least one before the prefix, and observed indexes within it",
                )
            )
        self.slot = -1
        self.sampled = spec.prefix - len(spec.observed)
        self._position = len(self._prompt)
        self._resumed: Routes | None = None
        # Whether something changes the distribution that the project's parameters do not know.
        self._biased = bool(params.logit_bias or params.allowed_token_ids or params.bad_words)

    def ended(self, logged: Logged) -> FinishReason:
        """Why a logged rollout is over, or RUNNING: its flag, or the finish predicate over its tokens."""
        if logged.finish is not FinishReason.RUNNING:
            return logged.finish
        return finish_reason(
            int(logged.token_T[-1]),
            sampled=len(logged),
            length=len(self._prompt) + len(logged),
            sampling=self.sampling,
            eos_token_ids=self._eos,
            max_context=self._max_context,
        )

    def replay(self, logged: Logged, reason: FinishReason) -> Outputs:
        """What is logged, as the first output of the request. A logged token has no rank: it says 0."""
        logprobs = routes = stop = None
        if self.wants_logprobs and bool(logged.logprob.valid_T.all()):
            tokens = logged.token_T[:, None]
            logprobs = LogprobsLists(tokens, logged.logprob.value_T[:, None], np.zeros(len(logged), np.int64))
        if reason is FinishReason.STOP_TOKEN:
            stop = int(logged.token_T[-1])
        if reason is not FinishReason.RUNNING and logged.routes is not None and logged.routes.valid_T.all():
            routes = logged.routes.value_T
        output = EngineCoreOutput(
            self.name,
            logged.token_T.tolist(),
            new_logprobs=logprobs,
            finish_reason=FINISH[reason],
            stop_reason=stop,
            routed_experts=routes,
        )
        return single(self.client, output)

    def go_on_from(self, request: VllmRequest, logged: Logged) -> None:
        """What is logged becomes part of the prompt: the model runner knows no other beginning."""
        request.append_output_token_ids(logged.token_T.tolist())
        request.prompt_token_ids = list(request.all_token_ids)
        request.num_prompt_tokens = len(request.prompt_token_ids)
        request._output_token_ids.clear()
        request.max_tokens -= len(logged)
        self.sampled = len(logged)
        self._position += len(logged)
        self._resumed = logged.routes

    def prepare(self, request: VllmRequest) -> None:
        """Parameters for vLLM: the draw is ours, its own sampling must leave it alone."""
        tokens = np.array(request.prompt_token_ids, np.int32)
        sampled = np.ones(len(tokens) - self._cut, np.bool_)
        sampled[list(self.spec.observed)] = False
        ours = Request(self.slot, tokens[: self._cut], tokens[self._cut :], sampled, self.sampling, self._key)
        params = request.sampling_params.clone()
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed = 0.0, 0, 1.0, 0.0, None
        params.repetition_penalty, params.presence_penalty, params.frequency_penalty = 1.0, 0.0, 0.0
        params.min_tokens = 0
        params.logprobs = params.logprobs if self.wants_logprobs else 0
        words = params.bad_words_token_ids or []
        params._bad_words_token_ids = None
        params.extra_args = {**(params.extra_args or {}), PLAN: plan_of(self.slot, ours, words)}
        request.sampling_params = params

    # -- steps --------------------------------------------------------------------------------------------------

    def drawn(self, draws: Draws) -> tuple[int, float] | None:
        """(token, sampling logprob) that was drawn for its next position."""
        return draws.find(self.slot, self._position)

    def sampling_logprobs(self, output: EngineCoreOutput, draws: Draws | None) -> NDArray[np.float32] | None:
        """Under the distribution that the tokens were drawn from; None where it is not known here, never a guess.

        Ask before `took`.
        """
        count = len(output.new_token_ids)
        if draws is not None and count == 1:
            token, value = self.drawn(draws) or (-1, 0.0)
            return np.array([value], np.float32) if token == output.new_token_ids[0] else None
        s = self.sampling
        if s.temperature == 0:
            return np.zeros(count, np.float32)  # the draw was certain
        plain = s.temperature == 1 and not s.top_k and s.top_p == 1 and not s.min_p and not s.min_tokens
        plain = plain and s.repetition_penalty == 1 and not s.presence_penalty and not s.frequency_penalty
        if plain and output.new_logprobs is not None and not self._biased:
            return np.ascontiguousarray(output.new_logprobs.logprobs[:, 0], np.float32)
        return None

    def took(self, output: EngineCoreOutput) -> FinishReason:
        """Count what a step sampled, and say in the project's terms why it ended."""
        self.sampled += len(output.new_token_ids)
        self._position += len(output.new_token_ids)
        if output.finish_reason is None or not output.new_token_ids:
            return FinishReason.RUNNING
        if output.finish_reason == VllmFinish.STOP:
            ends = not self.sampling.ignore_eos and output.new_token_ids[-1] in self._eos
            return FinishReason.EOS if ends else FinishReason.STOP_TOKEN
        if output.finish_reason == VllmFinish.LENGTH:
            full = self.sampled >= self.sampling.max_tokens
            return FinishReason.MAX_TOKENS if full else FinishReason.CONTEXT
        return FinishReason.RUNNING  # an abort or an error is an interruption

    def release(self, output: EngineCoreOutput) -> None:
        """Make a logged output what its client asked for."""
        if not self.wants_logprobs:
            output.new_logprobs = None
        known, routes = self._resumed, output.routed_experts
        if known is None or routes is None:
            return
        # The prefill of a resume went through all tokens again; the routes that count are those of the first time.
        self._resumed = None
        count = len(known.valid_T)
        if 0 < count < len(routes) and known.valid_T.all():
            output.routed_experts = np.concatenate((routes[: -count - 1], known.value_T, routes[-1:]))


def _check_prompt(spec: RolloutSpec, request: VllmRequest) -> None:
    """Raises BadInput: something beside token ids decides what is sampled. The rollout's identity would not hold it."""
    more = {
        "a LoRA adapter": request.lora_request is not None,
        "images or other multimodal inputs": bool(request.mm_features),
        "prompt embeddings": request.prompt_embeds is not None or request.prompt_is_token_ids is not None,
    }
    if found := [name for name, there in more.items() if there]:
        raise BadInput(
            problem(
                f"the request of rollout {spec.name!r} has {' and '.join(found)}",
                consequence="It was not accepted: the log knows a rollout by its tokens, and would resume it from "
                "another one's",
                remedy="Send token ids to the model itself, or send the request without a rollout id, unlogged",
            )
        )
