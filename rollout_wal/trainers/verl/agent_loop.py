"""verl's agent loop that has its rollout from the host."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ...backend import FinishedRollout
from ...errors import BadInput, MissingExtra, problem
from ...params import SamplingParams
from ..ray_host import get_host
from .settings import Settings

try:
    from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
except ImportError as error:
    raise MissingExtra(error.name or "verl", "verl", "training with verl") from None

#: Columns that the managers add: which member of which cohort a row is.
COHORT, SIZE, INDEX, GROUP, STEP = (f"rollout_wal_{n}" for n in ("cohort", "size", "index", "group", "step"))
#: The name under which the managers register the loop.
AGENT_NAME = "rollout_wal"


class RolloutWalAgentLoop(AgentLoopBase):
    """One row: its prompt is rendered by verl, and its rollout comes from the host, durable and in its cohort.

    Turns with tools are the backend's episodes, not verl's: their calls are logged and not repeated on a guess.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """verl's signature.

        Raises:
            BadInput: the row was not addressed by a manager of this package, or has images, videos or sounds.
        """
        if COHORT not in kwargs:
            raise BadInput(
                problem(
                    "the agent loop got a row that no manager of rollout_wal has addressed",
                    consequence="Nothing was sampled",
                    remedy="Set agent_loop_manager_class to a manager of rollout_wal.trainers.verl.manager",
                )
            )
        messages = list(kwargs["raw_prompt"])
        if await self.process_multi_modal_info(messages):
            raise BadInput(
                problem(
                    "a prompt has images, videos or sounds",
                    consequence="Nothing was sampled for it",
                    remedy="Use text prompts: the backend samples text only",
                )
            )
        settings = Settings.of(self.rollout_config)
        prompt = await self.ct_build_initial_tokens(messages)
        # verl counts the sessions of a prompt itself where it does not repeat the rows.
        index = int(kwargs[INDEX]) + int(kwargs.get("session_id", 0))
        started = time.monotonic()
        rollout: FinishedRollout = await get_host(settings.host).join.remote(
            str(kwargs[COHORT]),
            index,
            int(kwargs[SIZE]),
            prompt,
            sampling(sampling_params, int(self.rollout_config.response_length)),
            group_size=int(kwargs[GROUP]),
            seed=int(self.rollout_config.get("seed", 0) or 0) + int(kwargs[STEP]),
            metadata={"step": int(kwargs[STEP])},
        )
        labels = await get_host(settings.host).labels.remote()
        return output(
            rollout,
            prompt,
            response_length=int(self.rollout_config.response_length),
            filler=int(self.tokenizer.eos_token_id or 0),
            labels=labels,
            seconds=time.monotonic() - started,
        )


def sampling(params: Mapping[str, Any], response_length: int) -> SamplingParams:
    """verl's sampling parameters as this project's.

    Raises:
        BadSampling: one that is not known here.
    """
    raw = {k: v for k, v in params.items() if k != "logprobs"}  # they are always logged
    raw["top_k"] = max(0, int(raw.get("top_k", -1)))
    limit = int(raw.pop("max_tokens", raw.pop("max_new_tokens", response_length)))
    return SamplingParams.from_dict({**raw, "max_tokens": min(limit, response_length)})


def output(
    rollout: FinishedRollout,
    prompt: list[int],
    *,
    response_length: int,
    filler: int,
    labels: Mapping[int, int],
    seconds: float,
) -> AgentLoopOutput:
    """A rollout in verl's terms.

    The mask is 1 where a token was sampled, its log-probability is known, and the rollout is not censored. Elsewhere
    `response_logprobs` is 0.0, which is what verl pads it with: it reads them under the mask.

    Args:
        filler: stands for the response of a rollout that was censored before its first token, under mask 0.
        labels: optimizer steps of the policy versions; where one is unknown, the range of steps is None.
    """
    tokens = rollout.output[:response_length]
    used = tokens.sampled_T & tokens.sampling_logprob.valid_T & (rollout.censored is None)
    versions = [int(v) for v in tokens.version_T[tokens.sampled_T]]
    # A rollout that was censored before its first token is of the newest version: verl wants a number.
    steps = [labels.get(v) for v in sorted(set(versions)) or sorted(labels)[-1:]]
    known = [s for s in steps if s is not None]
    complete = bool(known) and len(known) == len(steps)
    empty = not len(tokens)
    return AgentLoopOutput(
        prompt_ids=prompt,
        response_ids=[filler] if empty else tokens.token_T.tolist(),
        response_mask=[0] if empty else used.astype(int).tolist(),
        response_logprobs=[0.0]
        if empty
        else [float(v) if ok else 0.0 for v, ok in zip(tokens.sampling_logprob.value_T, used, strict=True)],
        num_turns=2 + 2 * rollout.turns,
        metrics=AgentLoopMetrics(generate_sequences=seconds, num_preempted=rollout.interruptions),
        extra_fields={
            "rollout_id": rollout.id,
            "rollout_key": rollout.key,
            "policy_versions": [0] if empty else tokens.turn_version_T.tolist(),
            "interruptions": rollout.interruptions,
            "censored": rollout.censored,
            "min_global_steps": min(known) if complete else None,
            "max_global_steps": max(known) if complete else None,
            "turn_scores": [],
            "tool_rewards": [],
        },
    )
