"""`rollout.name=rollout_wal` in verl: where it would start servers of its own, it finds the host.

verl imports this where VERL_USE_EXTERNAL_MODULES names it, in every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...errors import BadInput, MissingExtra, problem
from ..ray_host import get_host
from .hosting import host_of
from .settings import Settings

try:
    import ray
    import torch
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
    from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry
except ImportError as error:
    raise MissingExtra(error.name or "verl", "verl", "training with verl") from None

NAME = "rollout_wal"


class WalReplica(RolloutReplica):
    """What verl takes for its server. It sleeps and wakes with nothing: the host keeps its devices."""

    async def launch_servers(self) -> None:
        """Find the host, or start it."""
        settings = Settings.of(self.config)
        self._server_handle = host_of(settings, str(self.model_config.path))
        self._server_address = settings.host


class WeightsToHost(BaseRollout):
    """What verl's actor workers take for their rollout: the way of the weights to the host."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """The host keeps its devices."""

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make them the policy in force. Returns when every worker of the host samples with them.

        Raises:
            BadInput: deltas or adapters. The old weights stay in force.
        """
        if wire_format != "named_tensors" or peft_config is not None:
            raise BadInput(
                problem(
                    f"weights as {wire_format}{' with an adapter' if peft_config is not None else ''}",
                    consequence="The old weights stay in force",
                    remedy="Use checkpoint_engine.backend=naive, and lora.merge=True with LoRA",
                )
            )
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        whole: dict[str, torch.Tensor] = {}
        for name, tensor in weights:  # on every rank: gathering a parameter takes all of them
            if first:
                whole[name] = tensor.detach().cpu().clone()
        if first:
            host = get_host(Settings.of(self.config).host)
            await host.update_weights.remote(ray.put(whole), label=global_steps)


_ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.{WeightsToHost.__name__}"
RolloutReplicaRegistry.register(NAME, lambda: WalReplica)
