"""TRL's GRPOTrainer on the rollouts of a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trl

from ...backend import FinishedRollout, RolloutBackend
from ..facts import Facts, left_out
from ..ledger import Fork
from .arguments import check_arguments, conflict
from .common import BackendTrainer


class GRPOTrainer(BackendTrainer, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose completions come from a `RolloutBackend`.

    Takes what `trl.GRPOTrainer` takes, except `rollout_func`, and

    Args:
        backend: running; it must be on a directory of its own for each rank of a distributed run.
        run: names this run in the backend's job; another name starts another run.
        archive: a dataset folder that keeps each consumed rollout with its reward and the step that used it; of a
            distributed run, one folder in it for each rank, rank-0 and so on.
        max_staleness: leave tokens out of the loss that are more than so many versions older than the policy of their
            batch; None: none. What this removes is logged as `rollouts/stale_share`.
        fork: resuming from a checkpoint older than the log: sample anew instead of refusing. Started again from the
            same checkpoint, the fork goes on; once it has a checkpoint of its own, this one is refused, and "again"
            gives it up, too. Checkpoints that a fork leaves behind move to `lineage-N` in the output folder.

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
        fork: Fork = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs, refused={"rollout_func": "the rollouts come from the backend"})
        super().__init__(*args, **kwargs)
        self.rollout_func = self._rollouts
        self._last: list[FinishedRollout] = []
        extras = {"reward_functions": list(self.reward_func_names)}
        self._use_backend(backend, run, archive, fork, max_staleness, extras)

    @property
    def _generate_every(self) -> int:
        return int(self.args.steps_per_generation * self.num_iterations)

    def _rollouts(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        prompt_ids, images, _ = self._tokenize_prompts(prompts)
        if images:
            raise conflict("images in the prompts", "the backend samples text only")
        generations = self.num_generations if self.model.training else self.num_generations_eval
        self._last = self._collect(prompt_ids, generations)
        return self._columns(prompt_ids, self._last)

    def _columns(self, prompt_ids: list[list[int]], rollouts: list[FinishedRollout]) -> dict[str, list[Any]]:
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
            used = used & self._fresh(rollout)
            sampled = output.sampling_logprob
            known = zip(sampled.value_T.tolist(), sampled.valid_T.tolist(), strict=True)
            logprobs = [float(value) if valid else None for value, valid in known]
            tokens, versions = output.token_T.tolist(), output.version_T.tolist()
            mask = used.astype(int).tolist()
            if not tokens:  # censored before its first token; TRL cannot hold an empty completion
                tokens, versions = [int(self._tokenizer.pad_token_id)], [self._policy_version(rollout)]
                mask, logprobs = [0], [None]
            rows["prompt_ids"].append(list(prompt))
            rows["completion_ids"].append(tokens)
            rows["logprobs"].append(logprobs)
            rows["env_mask"].append(mask)
            rows["rollout_id"].append(rollout.id)
            rows["policy_versions"].append(versions)
            rows["interruptions"].append(rollout.interruptions)
            rows["censored"].append(rollout.censored)
        return rows

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """As in TRL. A trainer that starts in the middle of a generation batch has weights that are newer than the
        batch: what TRL computes with them is not the old policy. The log has what was sampled with."""
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        self._facts = self._left_out(output)
        if self._step % self._generate_every and "old_per_token_logps" in output:
            sampled, computed = output["sampling_per_token_logps"], output["old_per_token_logps"]
            output["old_per_token_logps"] = torch.where(sampled.isnan(), computed, sampled)
            if "importance_sampling_ratio" in output:  # between two policies that are now one
                output["importance_sampling_ratio"] = torch.ones_like(output["importance_sampling_ratio"])
        return output

    def _left_out(self, output: Any) -> dict[int, Facts]:
        """By rollout id: what the loss will not see, by the masks here and by those that TRL has put on top."""
        verifier = ", ".join(self.reward_func_names)
        used_BC = (output["completion_mask"] * output["tool_mask"]).bool().cpu().numpy()
        return {
            r.id: Facts(verifier, left_out=left_out(r.output.sampled_T, used_C[: len(r.tokens)]))
            for r, used_C in zip(self._last, used_BC, strict=True)
        }

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
