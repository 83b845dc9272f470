"""verl's checkpoints consume what they contain."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ...errors import MissingExtra
from ..ledger import sync_tree, write_state
from ..ray_host import get_host
from .settings import Settings

try:
    import ray
    from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
except ImportError as error:
    raise MissingExtra(error.name or "verl", "verl", "training with verl") from None

logger = logging.getLogger(__name__)


class ConsumeWithCheckpoints(CheckpointCallback):
    """`trainer.checkpoint_callback_class`: what the steps up to a checkpoint were trained on is consumed with it.

    An asynchronous save consumes nothing, since nobody says when it is durable; the next start does.
    """

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        """verl's hook; what it raises ends the training."""
        if async_save:
            logger.warning("step %d is saved asynchronously: its rollouts stay in the log", global_step)
            return
        consume(Settings.of(self.config.actor_rollout_ref.rollout), global_step, Path(checkpoint_dir))


def consume(settings: Settings, step: int, folder: Path) -> None:
    """The checkpoint in `folder` contains every step up to `step`: make it durable, then consume their rollouts.

    For trainers that have no such hook, such as verl's legacy one.
    """
    host = get_host(settings.host)
    batches = settings.number(step + 1, 0)
    state = ray.get(host.state.remote(settings.run, batches, step, archive=settings.archive))
    sync_tree(folder)
    tracker = folder.parent / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        fd = os.open(tracker, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    write_state(folder, state)
    ray.get(host.restore.remote(settings.run, state, archive=settings.archive))
