"""verl's agent loop managers, with a cohort for each of their calls.

verl names its prompts at random, so a prompt that is asked for again after a restart has another name. What is the same
again is the optimizer step and the order of its calls: the data loader goes back with the checkpoint. So a call is a
cohort, named by them, and each row is addressed by its place in it before verl deals the rows out to its workers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput, MissingExtra, problem
from ..ledger import STATE_FILE, read_state
from .agent_loop import AGENT_NAME, COHORT, GROUP, INDEX, SIZE, STEP
from .hosting import host_of
from .settings import SUPPORTED, Settings

try:
    import ray
    import torch
    import verl
    from verl.experimental.agent_loop.agent_loop import AgentLoopManager as VerlManager
    from verl.utils import tensordict_utils
except ImportError as error:
    raise MissingExtra(error.name or "verl", "verl", "training with verl") from None

logger = logging.getLogger(__name__)


class Cohorts:
    """Names the cohorts of a trainer's process, and brings the log to its checkpoint before the first of them."""

    def __init__(self, config: Any) -> None:
        if not verl.__version__.startswith(tuple(f"{v}." for v in SUPPORTED)):
            raise BadInput(
                problem(
                    f"verl {verl.__version__} is not one of the supported versions: {', '.join(SUPPORTED)}.x",
                    consequence="Nothing was started: its inside may have moved",
                    remedy=f"pip install 'verl=={SUPPORTED[-1]}.*'",
                )
            )
        self._trainer = config.trainer
        self.settings = Settings.of(config.actor_rollout_ref.rollout)
        self.host = host_of(self.settings, str(config.actor_rollout_ref.model.path))
        self._restored = False
        self._calls: dict[tuple[bool, int], int] = {}

    def next(self, step: int, evaluation: bool) -> str:
        """The name of the cohort of verl's next call.

        Raises:
            CheckpointMismatch: the log has consumed what the checkpoint does not contain, or is of another job.
        """
        if not self._restored:
            self._restore(step if evaluation else step - 1)
            self._restored = True
        call = self._calls.get((evaluation, step), 0)
        self._calls[evaluation, step] = call + 1
        if evaluation:
            name: str = ray.get(self.host.fresh.remote(self.settings.evaluation(step, call)))
            return name
        return self.settings.cohort(step, call)

    def _restore(self, step: int) -> None:
        """verl has gone back to its checkpoint of step `step`."""
        run, archive = self.settings.run, self.settings.archive
        state = None
        if step > 0:
            folder = Path(str(self._trainer.default_local_dir)) / f"global_step_{step}"
            if self._trainer.get("resume_mode") == "resume_path":
                folder = Path(str(self._trainer.resume_from_path))
            if (folder / STATE_FILE).is_file():
                state = read_state(folder)
            else:
                # Killed between verl's checkpoint and ours; verl goes on from it, so it is whole.
                logger.warning("%s has no %s; it contains what was sampled up to step %d", folder, STATE_FILE, step)
                batches = self.settings.number(step + 1, 0)
                state = ray.get(self.host.state.remote(run, batches, step, archive=archive))
        ray.get(self.host.restore.remote(run, state, archive=archive))


class AgentLoopManager(VerlManager):  # type: ignore[misc,unused-ignore]
    """For the legacy trainer (`trainer.use_v1=False`): batches are `DataProto`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        use_our_loop(config)
        super().__init__(config, *args, **kwargs)
        self.cohorts = Cohorts(config)

    def generate_sequences(self, prompts: Any) -> Any:
        """As in verl. The rows of one call are one cohort."""
        rows = prompts.non_tensor_batch
        if "__do_sample__" in rows:
            raise _refused("REMAX's greedy rows in a batch", "a cohort has one set of sampling parameters")
        size = len(prompts)
        evaluation = bool(prompts.meta_info.get("validate", False))
        step = int(prompts.meta_info.get("global_steps", 0))
        _check_names(rows.get("agent_name"))
        group = int(self.rollout_config.val_kwargs.n if evaluation else self.rollout_config.n)
        raw = [list(messages) for messages in rows["raw_prompt"]]
        if size % group or any(raw[i] != raw[i - i % group] for i in range(size)):
            group = 1
        columns = {
            "agent_name": AGENT_NAME,
            COHORT: self.cohorts.next(step, evaluation),
            SIZE: size,
            GROUP: group,
            STEP: step,
        }
        for name, value in columns.items():
            rows[name] = np.array([value] * size, dtype=object)
        rows[INDEX] = np.arange(size)
        return super().generate_sequences(prompts)


class AgentLoopManagerTQ(VerlManager):  # type: ignore[misc,unused-ignore]
    """For verl's trainer (`trainer.use_v1=True`) in its mode `sync`: batches are `TensorDict`, answers go through
    TransferQueue."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # It brings TransferQueue, which only this trainer needs.
        try:
            from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ as Manager
            from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
        except ImportError as error:
            raise MissingExtra(error.name or "transfer_queue", "verl", "verl's trainer of version 1") from None
        mode = config.trainer.v1.trainer_mode
        if mode != "sync":
            raise _refused(f"trainer_mode={mode!r}", "which prompts a step asks for depends on time there")
        use_our_loop(config)
        self.agent_loop_workers_class = AgentLoopWorkerTQ
        super().__init__(config, *args, **kwargs)
        self._dispatch = Manager.generate_sequences
        self.cohorts = Cohorts(config)

    def generate_sequences(self, prompts: Any) -> None:
        """As in verl: it returns at once. The prompts of one call, each with its n samples, are one cohort."""
        for name in ("__do_sample__", "__rollout_n__"):
            if name in prompts:
                raise _refused(f"the column {name}", "a cohort has one group size and one set of sampling parameters")
        _check_names(prompts.get("agent_name", None))
        evaluation = bool(prompts["validate"]) if "validate" in prompts else False
        step = int(prompts["global_steps"])
        group = int(self.rollout_config.val_kwargs.n if evaluation else self.rollout_config.n)
        columns = {
            "agent_name": AGENT_NAME,
            COHORT: self.cohorts.next(step, evaluation),
            SIZE: len(prompts) * group,
            GROUP: group,
            STEP: step,
        }
        for name, value in columns.items():
            tensordict_utils.assign_non_tensor_data(prompts, name, value)
        prompts[INDEX] = torch.arange(len(prompts)) * group
        self._dispatch(self, prompts)


def use_our_loop(config: Any) -> None:
    """verl's workers learn of the agent loop from a file; one that is set already must list it itself."""
    agent = config.actor_rollout_ref.rollout.agent
    if not agent.get("agent_loop_config_path"):
        agent.agent_loop_config_path = str(Path(__file__).parent / "agent_loops.yaml")


def _check_names(names: Any) -> None:
    wrong = sorted({str(n) for n in np.atleast_1d(np.array(names, dtype=object))} - {AGENT_NAME, "None"})
    if wrong:
        raise _refused(f"the agent loops {wrong} of the data set", "rollouts come from the backend and its episodes")


def _refused(what: str, why: str) -> BadInput:
    return BadInput(
        problem(
            f"{what} and a rollout backend do not go together: {why}",
            consequence="Nothing was sampled",
            remedy="Leave it out",
        )
    )
