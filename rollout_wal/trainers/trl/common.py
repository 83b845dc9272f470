"""What the trainers of TRL share: rollouts from the backend, weights to it, checkpoints that the log agrees with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from numpy.typing import NDArray
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ...backend import FinishedRollout, RolloutBackend
from ...errors import BadInput, CheckpointMismatch, problem
from ...params import SamplingParams
from ..ledger import Facts, Fork, TrainerLedger, drop_state, read_state, sync_tree, write_state
from .arguments import conflict
from .checkpoints import last_checkpoint, set_aside
from .order import ByEpoch
from .weights import Weights


class BackendTrainer(Trainer):
    """Mixed into a trainer of TRL, in front of it.

    TRL takes the backend for its vLLM, and so corrects for the difference between sampler and trainer.
    """

    _step: int
    """Micro-steps so far. This and the next are of the trainer that it is mixed into."""
    _buffered_inputs: Any

    def _use_backend(
        self,
        backend: RolloutBackend,
        run: str,
        archive: str | Path | None,
        fork: Fork,
        max_staleness: int | None,
        extras: Mapping[str, Any],
    ) -> None:
        """After the trainer's own `__init__`."""
        self._backend = backend
        folder = Path(archive) if archive is not None else None
        if folder is not None and self.accelerator.num_processes > 1:
            # Ranks have jobs of their own, whose rollouts have the same ids and keys.
            folder = folder / f"rank-{self.accelerator.process_index}"
        self._ledger = TrainerLedger(
            backend,
            run,
            archive=folder,
            extras={"trainer": f"trl {trl.__version__}", **extras},
        )
        self._fork = fork
        self._max_staleness = max_staleness
        self._weights = Weights(backend, self._gather_weights, self._ledger.settle)
        self._sampling = self._sampling_params()
        self._evaluation = 0
        self._rewards: dict[int, float] = {}
        self._facts: dict[int, Facts] = {}
        self.use_vllm = True
        self.vllm_generation = self._weights
        self._last_loaded_step = -1
        self.add_callback(_Used(self))

    # -- generation -------------------------------------------------------------------------------------------------

    @property
    def _generate_every(self) -> int:
        """Micro-steps that one generation batch serves."""
        raise NotImplementedError

    @property
    def _generation(self) -> int:
        """Number of the generation batch that the current micro-step belongs to."""
        return self._step // self._generate_every

    def _collect(self, prompt_ids: list[list[int]], generations: int) -> list[FinishedRollout]:
        """The rollouts of this generation batch, one for each of the prompts and in their order."""
        training, batch = bool(self.model.training), self._generation
        grouped = _distinct(prompt_ids, generations)
        per_group = len(prompt_ids) // len(grouped)
        if not (training and self._ledger.begun(batch)):
            self._weights.hand_over(int(self.state.global_step))
        if training:
            # Logged with the first call, and the same after a restart: the policy that belongs to this batch.
            noted = {"generation": batch, "policy_version": self._backend.policy_version}
            rollouts = self._ledger.generate(
                batch,
                grouped,
                self._sampling,
                group_size=per_group,
                seed=self._seed(batch),
                metadata=[noted] * len(grouped),
            )
        else:
            self._evaluation += 1
            name = f"{self.state.global_step}.{self._evaluation}"
            seed = self._seed(0) ^ 0x5EED
            rollouts = self._ledger.evaluate(name, grouped, self._sampling, group_size=per_group, seed=seed, anew=True)
        self._measure("train" if training else "eval", rollouts)
        return rollouts

    def _gather_weights(self) -> dict[str, Any]:
        weights = self.accelerator.get_state_dict(self.model)
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}

    def _seed(self, batch: int) -> int:
        """Ranks may have members of one group, so each draws noise of its own."""
        return int(self.args.seed) + batch + (int(self.accelerator.process_index) << 40)

    def _policy_version(self, rollout: FinishedRollout) -> int:
        """Of the weights that the trainer had when the rollout's batch began. Not the newest in force: after a restart
        from an earlier checkpoint, the log is ahead."""
        logged = rollout.metadata.get("policy_version")
        return self._backend.policy_version if logged is None else int(logged)

    def _fresh(self, rollout: FinishedRollout) -> NDArray[np.bool_]:
        """[T]: tokens that are not more than `max_staleness` versions older than their batch's policy."""
        age_T = self._policy_version(rollout) - rollout.output.version_T
        return age_T <= (np.inf if self._max_staleness is None else self._max_staleness)

    def _measure(self, mode: str, rollouts: list[FinishedRollout]) -> None:
        age_T = np.concatenate([self._policy_version(r) - r.output.version_T[r.output.sampled_T] for r in rollouts])
        metrics = self._metrics[mode]
        metrics["rollouts/interruptions"].append(float(np.mean([r.interruptions for r in rollouts])))
        metrics["rollouts/censored"].append(float(np.mean([r.censored is not None for r in rollouts])))
        metrics["rollouts/staleness_max"].append(float(age_T.max(initial=0)))
        if self._max_staleness is not None:
            stale = float(np.mean(age_T > self._max_staleness)) if len(age_T) else 0.0
            metrics["rollouts/stale_share"].append(stale)

    def _sampling_params(self) -> SamplingParams:
        args: Any = self.args
        if args.generation_kwargs:
            raise conflict(f"generation_kwargs={args.generation_kwargs!r}", "pass what the config has fields for")
        own = self._backend.info.eos_token_ids
        return SamplingParams(
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            min_p=args.min_p or 0.0,
            repetition_penalty=args.repetition_penalty,
            max_tokens=args.max_completion_length,
            stop_token_ids=tuple(t for t in self.eos_token_ids if t not in own),
        )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> ByEpoch:
        # transformers counts epochs on in the state of its checkpoints, in parts of one.
        return ByEpoch(super()._get_train_sampler(*args, **kwargs), lambda: int(self.state.epoch or 0))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As in TRL, with the shuffle of a generation batch drawn from its number: a batch that is asked for again
        after a restart must be cut into the same steps."""
        begins = self._step % self._generate_every == 0 or self._buffered_inputs is None
        if not (self.model.training and begins):
            return super()._prepare_inputs(generation_batch)
        number = self._generation
        with _forked_rng(self.accelerator.device):
            torch.manual_seed((self.args.seed << 32) + number)
            inputs = super()._prepare_inputs(generation_batch)
        self._ledger.used(number, self.state.global_step + 1, self._rewards, self._facts)
        return inputs

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL. Nobody asks for these rollouts again: they are let go when it ends, and what a crash has left of
        an earlier one goes before it begins."""
        if not self.is_in_train:
            self._weights.forget()
        self._ledger.drop_evaluations()
        output = super().evaluation_loop(*args, **kwargs)
        self._ledger.drop_evaluations()
        return output

    def note_step(self, step: int) -> None:
        """Optimizer step `step` uses the generation batch of the micro-step that has just ended."""
        self._ledger.used((self._step - 1) // self._generate_every, step)

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
            self._check_ranks(folder, int(state.get("ranks", 1)))
        self._restore(state)
        self._step = int(state["micro_step"]) if state is not None else 0
        if state is not None and state["step"] >= self._steps_in_all():
            # transformers would take one more step, and so consume one more batch, each time it is started again.
            self._load_from_checkpoint(folder)
            self.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
            return TrainOutput(self.state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=folder or None, **kwargs)

    def _restore(self, state: Mapping[str, Any] | None) -> None:
        """Bring the log to where the checkpoint is."""
        lineage, step = (0, 0) if state is None else (int(state["lineage"]), int(state["step"]))
        # Before the log gives anything up: killed in between, the same call moves what is left, and forks then.
        forked = self._ledger.lineage_from(state, fork=self._fork)
        if forked > lineage and self.args.should_save:
            set_aside(self.args.output_dir, after=step, below=forked)
        self.accelerator.wait_for_everyone()
        self._ledger.restore(state, fork=self._fork)
        self._ledger.drop_evaluations()
        self._weights.forget()
        if state is not None:
            self._take_up(state)

    def _steps_in_all(self) -> float:
        """After how many optimizer steps training ends."""
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return float("inf") if steps is None else int(steps)

    def _own_state(self) -> dict[str, Any]:
        """What else a checkpoint must hold, as plain types."""
        return {}

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint that holds this."""

    def _check_ranks(self, folder: str, ranks: int) -> None:
        if ranks != self.accelerator.num_processes:
            raise CheckpointMismatch(
                problem(
                    f"{folder} was written by {ranks} ranks, and there are {self.accelerator.num_processes}",
                    consequence="Nothing was changed; which rank has which rollouts depends on their number",
                    remedy=f"Start {ranks} ranks, or a new run with logs of its own",
                )
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in TRL. When the checkpoint is durable, what it contains is consumed."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        rank, ranks = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        state = self._ledger.state(self._generation, int(self.state.global_step))
        state |= {"micro_step": self._step, "ranks": ranks, **self._own_state()}
        if not rank:
            drop_state(folder)
        self.accelerator.wait_for_everyone()
        # Not yet: the older checkpoints must stay until this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_tree(folder)
        if rank:
            write_state(folder, state, rank=rank)
        self.accelerator.wait_for_everyone()
        if not rank:  # last: a folder that has it is whole
            write_state(folder, state)
        self.accelerator.wait_for_everyone()
        self._ledger.commit(state)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )


class _Used(TrainerCallback):
    """Notes which optimizer step used a generation batch last."""

    def __init__(self, trainer: BackendTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.note_step(state.global_step + 1)


def _distinct(prompt_ids: list[list[int]], generations: int) -> list[list[int]]:
    """Each prompt once, if every one is there `generations` times in a row; else all of them, as they are."""
    groups = [prompt_ids[i : i + generations] for i in range(0, len(prompt_ids), generations)]
    if all(len(g) == generations and all(p == g[0] for p in g) for g in groups):
        return [g[0] for g in groups]
    return prompt_ids


def _forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """What is seeded in here, on every device, is afterwards as it was before: the masks of dropout go on."""
    if device.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    devices = range(torch.get_device_module(device.type).device_count())
    return torch.random.fork_rng(devices=devices, device_type=device.type)
