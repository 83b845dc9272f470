"""TRL's GRPOTrainer with this project as its rollout backend.

    from rollout_wal.backend import RolloutBackend
    from rollout_wal.trainers.trl import GRPOTrainer, last_checkpoint

    with RolloutBackend("models/tiny", "runs/wal", workers=2) as backend:
        trainer = GRPOTrainer(model, reward_funcs, args=config, train_dataset=data, backend=backend)
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))

Kill the process or its workers at any moment and run it again: rollouts in flight go on from their last durable token,
those that the checkpoint contains never come again, and all others come again under the same ids.

Written for TRL 1.16. The trainer's own seams for vLLM are used: the weights are handed over where TRL synchronises
vLLM, and the importance-sampling correction is TRL's, fed with the log-probabilities that were logged when each token
was sampled. So a token keeps the log-probability of the policy version that sampled it, however many versions its
rollout went through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..backend import FinishedRollout, RolloutBackend
from ..errors import BadInput, MissingExtra, problem
from ..params import SamplingParams
from .ledger import STATE_FILE, TrainerLedger, read_state, sync_tree, write_state

try:
    import torch
    import trl
    from transformers import TrainerCallback
    from transformers.trainer_callback import TrainerControl, TrainerState
    from transformers.trainer_utils import TrainOutput, rotate_checkpoints
except ImportError as error:
    raise MissingExtra(error.name or "trl", "trl", "training with TRL") from None

#: Versions of TRL whose trainer this was read against and tested with.
SUPPORTED: Final = ("1.16",)


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose completions come from a `RolloutBackend`.

    Takes what `trl.GRPOTrainer` takes, except `rollout_func`, and

    Args:
        backend: running; it must be on a directory of its own for each rank of a distributed run.
        run: names this run in the backend's job; another name starts another run.
        archive: a dataset folder that keeps each consumed rollout with its reward and the step that used it.
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
        _check_version()
        if kwargs.get("rollout_func") is not None:
            raise _conflict("rollout_func", "the rollouts come from the backend")
        if kwargs.get("peft_config") is not None:
            raise _conflict("peft_config", "the backend's engine loads whole weights, not adapters")
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if getattr(config, "use_vllm", False):
            raise _conflict("use_vllm=True", "to sample with vLLM, give the backend an EngineSpec of the vLLM engine")
        super().__init__(*args, **kwargs)
        self._backend = backend
        self._ledger = TrainerLedger(
            backend,
            run,
            archive=Path(archive) if archive is not None else None,
            extras={"trainer": f"trl {trl.__version__}", "reward_functions": list(self.reward_func_names)},
        )
        self._max_staleness = max_staleness
        self._fork = fork
        self._sampling = self._sampling_params()
        self._batch: list[FinishedRollout] = []
        self._evaluation = 0
        # From here on TRL takes the backend for its vLLM: it says when weights must be handed over, and corrects by
        # the ratio of its own log-probabilities to those of the sampler.
        self.rollout_func = self._rollouts
        self.use_vllm = True
        self.vllm_generation = _Weights(self)
        self._last_loaded_step = -1
        self.add_callback(_Used(self))

    # -- generation -------------------------------------------------------------------------------------------------

    @property
    def _generation(self) -> int:
        """Number of the generation batch that the current step belongs to."""
        return int(self._step // (self.args.steps_per_generation * self.num_iterations))

    def _rollouts(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        prompt_ids, images, _ = self._tokenize_prompts(prompts)
        if images:
            raise _conflict("images in the prompts", "the backend samples text only")
        training = bool(self.model.training)
        generations = self.num_generations if training else self.num_generations_eval
        grouped = _distinct(prompt_ids, generations)
        per_group = len(prompt_ids) // len(grouped)
        if training:
            batch = self._generation
            meta = [{"generation": batch, "step": int(self.state.global_step)} for _ in grouped]
            rollouts = self._ledger.generate(
                batch, grouped, self._sampling, group_size=per_group, seed=self.args.seed + batch, metadata=meta
            )
            self._batch = rollouts
        else:
            self._evaluation += 1
            name = f"{self.state.global_step}.{self._evaluation}"
            rollouts = self._ledger.evaluate(
                name, grouped, self._sampling, group_size=per_group, seed=self.args.seed ^ 0x5EED
            )
        self._measure("train" if training else "eval", rollouts)
        return self._columns(prompt_ids, rollouts)

    def _columns(self, prompt_ids: list[list[int]], rollouts: list[FinishedRollout]) -> dict[str, list[Any]]:
        newest = self._backend.policy_version
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
            logprobs = [float(v) if ok else None for v, ok in zip(*_pairs(output.sampling_logprob), strict=True)]
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
        return rows

    def _measure(self, mode: str, rollouts: list[FinishedRollout]) -> None:
        newest = self._backend.policy_version
        age_T = np.concatenate([newest - r.output.version_T[r.output.sampled_T] for r in rollouts])
        metrics = self._metrics[mode]
        metrics["rollouts/interruptions"].append(float(np.mean([r.interruptions for r in rollouts])))
        metrics["rollouts/censored"].append(float(np.mean([r.censored is not None for r in rollouts])))
        metrics["rollouts/staleness_max"].append(float(age_T.max(initial=0)))
        if self._max_staleness is not None:
            metrics["rollouts/stale_share"].append(float(np.mean(age_T > self._max_staleness)) if len(age_T) else 0.0)

    def _sampling_params(self) -> SamplingParams:
        if self.args.generation_kwargs:
            raise _conflict(f"generation_kwargs={self.args.generation_kwargs!r}", "pass what GRPOConfig has fields for")
        own = self._backend.info.eos_token_ids
        stops = [t for t in self.eos_token_ids if t not in own]
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_completion_length,
            stop_token_ids=tuple(stops),
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As in TRL, with the shuffle of a generation batch drawn from its number: a batch that is asked for again
        after a restart must be cut into the same steps."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        number, fresh = self._generation, self._buffered_inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.args.seed << 32) + number)
            inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not fresh:
            self._ledger.used(number, self.state.global_step + 1, self._rewards)
        return inputs

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """As in TRL. A trainer that starts in the middle of a generation batch has weights that are newer than the
        batch: what TRL computes with them is not the old policy. The log has what was sampled with."""
        output = super()._generate_and_score_completions(inputs)
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self.model.training and self._step % generate_every and "importance_sampling_ratio" in output:
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

    def note_step(self, step: int) -> None:
        """Optimizer step `step` uses the generation batch of the micro-step that has just ended."""
        self._ledger.used((self._step - 1) // (self.args.steps_per_generation * self.num_iterations), step)

    # -- weights and checkpoints --------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in TRL. `True` resumes from the last whole checkpoint of the output folder, and fails without one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise BadInput(
                    problem(
                        f"{self.args.output_dir} holds no whole checkpoint",
                        consequence="Nothing was trained",
                        remedy="Pass resume_from_checkpoint=last_checkpoint(output_dir), which is None without one",
                    )
                )
        state: Mapping[str, Any] | None = None
        folder = str(resume_from_checkpoint or "")
        if folder:
            state = read_state(Path(folder), rank=self.accelerator.process_index)
        self._ledger.restore(state, fork=self._fork)
        self._step = int(state["micro_step"]) if state is not None else 0
        if state is not None and 0 < self.args.max_steps <= state["step"]:
            # transformers would take one more step, and so consume one more batch, each time it is started again.
            self._load_from_checkpoint(folder)
            self.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
            return TrainOutput(self.state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=folder or None, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in TRL. When the checkpoint is durable, what it contains is consumed."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        state = self._ledger.state(self._generation, int(self.state.global_step)) | {"micro_step": self._step}
        # Not yet: the older checkpoints must stay until this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_tree(folder)
        # Last: a folder that has it is whole.
        write_state(folder, state, rank=self.accelerator.process_index)
        self._ledger.commit(state)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def hand_over_weights(self) -> None:
        """Make the model's weights the policy in force, under the next version unless they are in force already."""
        weights = self.accelerator.get_state_dict(self.model)
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
        version = self._backend.policy_version
        if self._last_loaded_step < 0:
            # The first time in this process: after a restart these are usually the weights that are in force.
            with contextlib.suppress(BadInput):
                self._backend.update_weights(weights, version)
                return
        self._backend.update_weights(weights, version + 1)


class _Weights:
    """What TRL takes for its vLLM client."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def sync_weights(self) -> None:
        self._trainer.hand_over_weights()


class _Used(TrainerCallback):
    """Notes which optimizer step used a generation batch last."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.note_step(state.global_step + 1)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a trainer's output folder; one that a crash cut short is passed over."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), str(path))
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and (path / STATE_FILE).is_file()
    ]
    return max(found)[1] if found else None


def _distinct(prompt_ids: list[list[int]], generations: int) -> list[list[int]]:
    """Each prompt once, if every one is there `generations` times in a row; else all of them, as they are."""
    groups = [prompt_ids[i : i + generations] for i in range(0, len(prompt_ids), generations)]
    if all(len(g) == generations and all(p == g[0] for p in g) for g in groups):
        return [g[0] for g in groups]
    return prompt_ids


def _pairs(masked: Any) -> tuple[list[float], list[bool]]:
    return masked.value_T.tolist(), masked.valid_T.tolist()


def _conflict(what: str, why: str) -> BadInput:
    return BadInput(
        problem(
            f"{what} and a rollout backend do not go together: {why}",
            consequence="No trainer was made",
            remedy="Leave it out",
        )
    )


def _check_version() -> None:
    if not trl.__version__.startswith(tuple(f"{v}." for v in SUPPORTED)):
        raise BadInput(
            problem(
                f"TRL {trl.__version__} is not one of the supported versions: {', '.join(SUPPORTED)}.x",
                consequence="No trainer was made: its inside may have moved",
                remedy=f"pip install 'trl=={SUPPORTED[-1]}.*'",
            )
        )
