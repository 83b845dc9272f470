"""verl's training loop on a CPU: a platform of its own kind, registered where verl registers its accelerators.

verl names cuda, npu and rocm; this one is the CPU, so that its entry point, its trainer, its FSDP workers and its
checkpoints run where there is no accelerator. It is for these tests. verl imports it, in every process, where
VERL_USE_EXTERNAL_MODULES names it; VERL_PLATFORM=cpu selects it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.utils import distributed


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    """Devices are named "cpu", collectives are gloo's, and what there is nothing of does nothing."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")  # verl moves tensors `.to` it, where a number would be a GPU's

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"  # a unit that Ray counts (`ray_init.num_gpus`), and that verl's placement asks for by name

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def fill_in(module: Any) -> None:
    """verl knows that torch.cpu has no statistics of memory, and not at all the places where it asks for them; what it
    kept of the random state of the device it hands back here."""
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *args: 0)
    module.empty_cache = lambda: None
    module.set_rng_state = torch.set_rng_state


fill_in(torch.cpu)
# For "every device and the CPU" it would say "cpu:gloo,cpu:gloo", which torch refuses.
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="cpu:gloo"
)
