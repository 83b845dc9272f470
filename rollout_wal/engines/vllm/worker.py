"""What the adapter asks of vLLM's worker processes: an extension class, reached through `collective_rpc`."""

from __future__ import annotations

from typing import Any

from .model import Checkpoint
from .processor import PositionNoise

EXTENSION = "rollout_wal.engines.vllm.worker.WorkerExtension"


class WorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`."""

    model_runner: Any

    def rollout_wal_drawn(self) -> tuple[list[int], list[int], list[float], list[float]]:
        """tag, token, logprob and sampling logprob of the rows that were drawn in the last step."""
        assert PositionNoise.draws is not None
        d = PositionNoise.draws.last
        return d.tag_N.tolist(), d.token_N.tolist(), d.logprob_N.tolist(), d.sampling_logprob_N.tolist()

    def rollout_wal_reload(self, folder: str) -> None:
        """Load other weights of the same model in place. Every rank reads the checkpoint and takes its share."""
        from pathlib import Path

        checkpoint = Checkpoint(Path(folder))
        self.model_runner.reload_weights(weights_iterator=((name, checkpoint[name]) for name in checkpoint))
