"""A model folder's weights: what is in it, which it is, and whether it can take a running model's place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ArchitectureMismatch, BadInput, problem
from .identity import architecture_digest

_SAMPLE_BYTES: Final = 1 << 16
_SAMPLES: Final = 256


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model folder, read when asked for.

    Raises:
        BadInput: a folder without safetensors, or with a file that is cut short.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.folder = folder
        self._dtype = dtype
        self._files: dict[str, Any] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise BadInput(
                problem(
                    f"{folder} holds no *.safetensors",
                    consequence="Its weights cannot be told from others, so they were not loaded",
                    remedy="Save the model with save_pretrained",
                )
            )
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    problem(
                        f"{path} cannot be read: {error}",
                        consequence="The weights in force were not touched",
                        remedy="Write the file whole, then try again",
                    )
                ) from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, without reading the tensors."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}


def quick_digest(folder: Path) -> str:
    """Tells a checkpoint from others without reading all of it: names, sizes, headers and samples of its files.

    A server starts with weights of hundreds of gigabytes; a digest over all of them would take minutes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for at in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"quick:{digest.hexdigest()}"


def same_architecture(running: Path, new: Path) -> None:
    """Raises ArchitectureMismatch: the configurations differ in what the weights mean."""
    ours, theirs = (architecture_digest(config_of(folder) or {}) for folder in (running, new))
    if ours != theirs:
        raise mismatch(f"{new} has the architecture digest {theirs}, the running model {ours}")


def same_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ArchitectureMismatch: tensors are missing, unknown or of another shape."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise mismatch(f"the weights lack {missing[:4]} and have unknown names {unknown[:4]}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise mismatch(f"{name} is {found[name]} in the new weights, {shape} in the running model")


def mismatch(what: str) -> ArchitectureMismatch:
    return ArchitectureMismatch(
        problem(
            what,
            consequence="The old weights stay in force and the policy version is unchanged",
            remedy="Load weights of the same model; another model needs an engine of its own",
        )
    )


def model_folder(folder: str | Path) -> Path:
    """Raises BadInput: no folder of a model."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise BadInput(
            problem(
                f"{path} is not a model folder: it has no config.json",
                consequence="No model was loaded",
                remedy="Pass a folder written by save_pretrained; nothing is downloaded",
            )
        )
    return path


def config_of(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, or None."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
