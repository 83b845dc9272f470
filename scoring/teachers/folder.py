"""What a model folder on disk is: its digests, and whether it still is what it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rollout_wal.dataset import Provenance
from rollout_wal.engines.common.identity import chat_template_digest, tokenizer_digest

from ..errors import mismatch

_WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def checkpoint_digest(folder: Path) -> str:
    """BLAKE2b-128 over names and bytes of configuration and weights, in lower-case hex."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _weight_files(folder):
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class ModelFolder:
    """A folder whose digests are taken once, here. Names, sizes and times tell whether to take them again.

    Args:
        teacher: who is loaded from it.
        precision: see `Provenance`.
    """

    def __init__(self, teacher: str, path: Path, precision: str) -> None:
        self.path = path
        self._stat = _stat(path)
        self.provenance = Provenance(
            teacher, checkpoint_digest(path), tokenizer_digest(path), chat_template_digest(path), precision
        )

    def check_unchanged(self) -> None:
        """Raises ScoreProvenanceMismatch: it holds other weights than those whose scores have been given out."""
        stat = _stat(self.path)
        if stat != self._stat:
            found, expected = checkpoint_digest(self.path), self.provenance.checkpoint
            if found != expected:
                raise mismatch(f"the checkpoint of teacher {self.provenance.source!r} on disk", found, expected)
            self._stat = stat


def vocabulary(config: Any, folder: Path) -> int:
    """Token ids that exist: those of the tokenizer in the folder, where the model's logits are padded beyond them.

    Args:
        config: the model's, for text.
    """
    path, size = folder / "tokenizer.json", int(config.vocab_size)
    if not path.is_file():
        return size
    from tokenizers import Tokenizer

    return min(size, int(max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values())) + 1)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern))


def _stat(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    stats = ((path.name, path.stat()) for path in _weight_files(folder))
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)
