"""TRL's GRPOTrainer on the rollouts of a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl

from ...backend import FinishedRollout, RolloutBackend
from ..facts import Facts, left_out
from .common import BackendTrainer, check_arguments, conflict, pairs


class GRPOTrainer(BackendTrainer, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose completions come from a `RolloutBackend`.

    Takes what `trl.GRPOTrainer` takes, except `rollout_func`, and

    Args:
        backend: running; it must be on a directory of its own for each rank of a distributed run.
        run: names this run in the backend's job; another name starts another run.
        archive: a dataset folder that keeps each consumed rollout with its reward and the step that used it; of a
            distributed run, one folder in it for each rank, rank-0 and so on.
        max_staleness: leave tokens out of the loss whose policy version is more than so many versions old; None: none.
            What this removes is logged as `rollouts/stale_share`.
        fork: resuming from a checkpoint older than the log: sample anew instead of refusing.

    Raises:
        BadInput: options that cannot be honoured together; the message says which.
    """

    def __init__(
        self,
        *args: Any,
        backend: RolloutBackend,
        run: str = "grpo",
        archive: str | Path | None = None,
        max_staleness: int | None = None,
        fork: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs, refused={"rollout_func": "the rollouts come from the backend"})
        super().__init__(*args, **kwargs)
        self._max_staleness = max_staleness
        self.rollout_func = self._rollouts
        self._use_backend(backend, run, archive, fork, {"reward_functions": list(self.reward_func_names)})

    @property
    def _generate_every(self) -> int:
        return int(self.args.steps_per_generation * self.num_iterations)

    def _rollouts(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        prompt_ids, images, _ = self._tokenize_prompts(prompts)
        if images:
            raise conflict("images in the prompts", "the backend samples text only")
        rollouts = self._collect(prompt_ids, self.num_generations if self.model.training else self.num_generations_eval)
        return self._columns(prompt_ids, rollouts)

    def _columns(self, prompt_ids: list[list[int]], rollouts: list[FinishedRollout]) -> dict[str, list[Any]]:
        newest = self._backend.policy_version
        verifier = ", ".join(self.reward_func_names)
        facts = {}
        rows: dict[str, list[Any]] = {
            name: []
            for name in (
                *("prompt_ids", "completion_ids", "logprobs", "env_mask"),
                *("rollout_id", "policy_versions", "interruptions", "censored"),
            )
        }
        for prompt, rollout in zip(prompt_ids, rollouts, strict=True):
            output = rollout.output
            used = output.sampled_T & output.sampling_logprob.valid_T & (rollout.censored is None)
            if self._max_staleness is not None:
                used = used & (newest - output.version_T <= self._max_staleness)
            facts[rollout.id] = Facts(verifier, left_out=left_out(output.sampled_T, used))
            logprobs = [float(v) if ok else None for v, ok in zip(*pairs(output.sampling_logprob), strict=True)]
            tokens, versions = output.token_T.tolist(), output.version_T.tolist()
            mask = used.astype(int).tolist()
            if not tokens:  # censored before its first token; TRL cannot hold an empty completion
                tokens, versions, mask, logprobs = [int(self._tokenizer.pad_token_id)], [newest], [0], [None]
            rows["prompt_ids"].append(list(prompt))
            rows["completion_ids"].append(tokens)
            rows["logprobs"].append(logprobs)
            rows["env_mask"].append(mask)
            rows["rollout_id"].append(rollout.id)
            rows["policy_versions"].append(versions)
            rows["interruptions"].append(rollout.interruptions)
            rows["censored"].append(rollout.censored)
        if self.model.training:
            self._facts = facts
        return rows

    def _measure(self, mode: str, rollouts: list[FinishedRollout]) -> None:
        super()._measure(mode, rollouts)
        if self._max_staleness is not None:
            newest = self._backend.policy_version
            age_T = np.concatenate([newest - r.output.version_T[r.output.sampled_T] for r in rollouts])
            stale = float(np.mean(age_T > self._max_staleness)) if len(age_T) else 0.0
            self._metrics[mode]["rollouts/stale_share"].append(stale)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """As in TRL. A trainer that starts in the middle of a generation batch has weights that are newer than the
        batch: what TRL computes with them is not the old policy. The log has what was sampled with."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._step % self._generate_every and "importance_sampling_ratio" in output:
            sampled, computed = output["sampling_per_token_logps"], output["old_per_token_logps"]
            output["old_per_token_logps"] = torch.where(sampled.isnan(), computed, sampled)
            output["importance_sampling_ratio"] = torch.ones_like(output["importance_sampling_ratio"])
        return output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """As in TRL; a censored rollout is not scorable."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        censored = torch.tensor([row["censored"] is not None for row in inputs], device=rewards.device)
        rewards[self.accelerator.gather(censored)] = torch.nan
        if self.model.training:
            first = self.accelerator.process_index * len(inputs)
            own = rewards[first : first + len(inputs)]
            weighed = own * self.reward_weights.to(own.device).unsqueeze(0)
            total = torch.where(own.isnan().all(1), torch.nan, weighed.nansum(1))
            self._rewards = {int(row["rollout_id"]): float(r) for row, r in zip(inputs, total, strict=True)}
        return rewards
