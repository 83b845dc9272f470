"""What TRL's trainers cannot be asked for together with a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...errors import BadInput, MissingExtra, problem

try:
    import trl
except ImportError as error:
    raise MissingExtra(error.name or "trl", "trl", "training with TRL") from None

#: Versions of TRL whose trainers this was read against and tested with.
SUPPORTED: Final = ("1.16",)

#: Of every trainer, and why not.
_REFUSED: Final = {
    "peft_config": "the backend's engine loads whole weights, not adapters",
    "tools": "TRL's loop would call them again after a crash, and drop the masks of what is sampled; the backend's "
    "episodes call tools",
    "environment_factory": "TRL's loop would step environments again after a crash; the backend's episodes call tools",
}


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *, refused: Mapping[str, str]) -> None:
    """Raises BadInput for what cannot be honoured; before the trainer is made, which may start a vLLM."""
    _check_version()
    for name, why in (_REFUSED | dict(refused)).items():
        if kwargs.get(name):
            raise conflict(name, why)
    config = kwargs.get("args", next((a for a in args if hasattr(a, "max_completion_length")), None))
    if getattr(config, "use_vllm", False):
        raise conflict("use_vllm=True", "to sample with vLLM, give the backend an EngineSpec of the vLLM engine")


def check_student(model: Any) -> None:
    """The student's logits are computed here, from its last hidden states and its head and nothing else."""
    config = model.config.get_text_config()
    found = [
        f"{name}={value}"
        for name in (
            "final_logit_softcapping",
            "logit_scale",
            "logits_scaling",
            "output_multiplier",
            "lm_head_multiplier",
        )
        if (value := getattr(config, name, None)) not in (None, 1.0)
    ]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found.append("a bias of the LM head")
    if found:
        raise BadInput(
            problem(
                f"the student changes its logits after its head: {', '.join(found)}",
                consequence="No trainer was made; it would have been compared with its teachers by other numbers than "
                "those it samples from",
                remedy="Distill into a model without that, or compute the loss in a loop of your own with gkd_loss",
            )
        )


def conflict(what: str, why: str) -> BadInput:
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
