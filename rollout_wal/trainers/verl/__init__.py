"""verl with this project as its rollouts.

    actor_rollout_ref.rollout.name=rollout_wal
    actor_rollout_ref.rollout.agent.agent_loop_manager_class=rollout_wal.trainers.verl.manager.AgentLoopManagerTQ
    +actor_rollout_ref.rollout.custom.rollout_wal.path=runs/wal
    trainer.checkpoint_callback_class=rollout_wal.trainers.verl.checkpoints.ConsumeWithCheckpoints

with VERL_USE_EXTERNAL_MODULES=rollout_wal.trainers.verl.engine in the environment. The rollouts live in a Ray actor
(`rollout_wal.trainers.ray_host`); verl's agent loops ask it, its actor workers hand the weights over to it, and its
checkpoints consume what they contain.

Written for verl 0.9. Its trainer of version 1 is supported in its mode `sync`, the legacy one for rollouts.
"""

from .settings import SUPPORTED, Settings

__all__ = ["SUPPORTED", "Settings"]
