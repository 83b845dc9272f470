"""What neither the plug-in nor the embedded engine can work with: refused before anything is generated."""

from __future__ import annotations

from typing import Any, Final

from ...errors import BadInput, problem

#: Fields of ServerArgs that make SGLang sample elsewhere, or show tokens on other ways than the output streamer: the
#: value that leaves it alone, and why no other.
UNSUPPORTED: Final[dict[str, tuple[Any, str]]] = {
    "speculative_algorithm": (None, "speculative decoding draws several tokens at a position"),
    "disaggregation_mode": ("null", "prefill and decode have a log each, and none of them the whole"),
    "pp_size": (1, "pipeline stages sample in a process of their own"),
    "dllm_algorithm": (None, "a diffusion model does not sample position by position"),
    "enable_mixed_chunk": (False, "the requests of a mixed batch cannot be told apart"),
}


def check_configuration(scheduler: Any, variable: str) -> None:
    """Whether rollouts of this scheduler can be logged and resumed.

    Args:
        variable: that turns the plug-in on; named in the remedy.

    Raises:
        BadInput: a configuration under which tokens would not be drawn by position, or not be logged.
    """
    for name, (allowed, why) in UNSUPPORTED.items():
        value = getattr(scheduler.server_args, name, allowed)
        if value != allowed:
            raise BadInput(
                problem(
                    f"SGLang runs with {name}={value!r}: {why}",
                    consequence="It was not started, because rollouts could not be logged and resumed",
                    remedy=f"Leave {name} out, or unset {variable}",
                )
            )
    if scheduler.rust_server is not None:
        raise BadInput(
            problem(
                "SGLang runs with its Rust front end, which takes outputs past the log",
                consequence="It was not started, because rollouts could not be logged",
                remedy=f"Unset SGLANG_RUST_SERVER, or unset {variable}",
            )
        )
