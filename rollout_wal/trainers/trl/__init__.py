"""TRL's trainers with this project as their rollout backend.

    from rollout_wal.backend import RolloutBackend
    from rollout_wal.trainers.trl import GRPOTrainer, last_checkpoint

    with RolloutBackend("models/tiny", "runs/wal", workers=2) as backend:
        trainer = GRPOTrainer(model, reward_funcs, args=config, train_dataset=data, backend=backend)
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))

Kill the process or its workers at any moment and run it again: rollouts in flight go on from their last durable token,
those that the checkpoint contains never come again, and all others come again under the same ids.

Written for TRL 1.16. The trainer's own seams for vLLM are used: the importance-sampling correction is TRL's, fed with
the log-probabilities that were logged when each token was sampled. A batch is sampled under one policy version, after
a restart as well: what had begun goes on under the version it began with.
"""

from typing import Any

from .arguments import SUPPORTED
from .checkpoints import last_checkpoint
from .grpo import GRPOTrainer

__all__ = ["SUPPORTED", "DistillationTrainer", "GRPOTrainer", "last_checkpoint"]


def __getattr__(name: str) -> Any:
    """Distillation needs the extra `scoring` too, so it is imported when it is asked for."""
    if name != "DistillationTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .distillation import DistillationTrainer

    return DistillationTrainer
