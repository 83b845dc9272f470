"""What a model folder's weights are made of, and whether others can take their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ...errors import ArchitectureMismatch, problem
from ..common.identity import architecture_digest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Names and shapes of a folder's tensors, and its architecture. SGLang checks neither before it overwrites weights,
    and rolls back from the folder that has just failed."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, folder: Path) -> Checkpoint:
        """Raises ArchitectureMismatch: a folder whose weights cannot be read whole."""
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            shapes: dict[str, tuple[int, ...]] = {}
            for path in _files(folder):
                with safe_open(path, framework="pt") as tensors:
                    shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise _mismatch(f"the weights in {folder} cannot be read: {error}") from error
        if not shapes:
            raise _mismatch(f"{folder} has no safetensors")
        return cls(architecture_digest(config.to_dict()), shapes)

    def check_same_model(self, source: Path | Mapping[str, Any]) -> None:
        """Raises ArchitectureMismatch: names, shapes or configuration differ."""
        if isinstance(source, Path):
            other = Checkpoint.of(source)
            if other.architecture != self.architecture:
                raise _mismatch(
                    f"{source} has the architecture digest {other.architecture}, the running model {self.architecture}"
                )
            shapes = other.shapes
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        missing, unknown = sorted(set(self.shapes) - set(shapes)), sorted(set(shapes) - set(self.shapes))
        if missing or unknown:
            raise _mismatch(f"the weights lack {missing[:4]} and have unknown names {unknown[:4]}")
        for name, shape in shapes.items():
            if shape != self.shapes[name]:
                raise _mismatch(
                    f"{name} is {list(shape)} in the new weights, {list(self.shapes[name])} in the running model"
                )


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    return sorted(folder.glob("*.safetensors"))


def _mismatch(what: str) -> ArchitectureMismatch:
    return ArchitectureMismatch(
        problem(
            what,
            consequence="The old weights stay in force and the policy version is unchanged",
            remedy="Load weights of the same model, whole; another model needs an engine of its own",
        )
    )
