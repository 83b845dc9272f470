"""transformers models as teachers: float32, bfloat16, MXFP4, and frozen snapshots of a student."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from rollout_kernels.errors import KernelError
from rollout_wal.dataset import Provenance
from rollout_wal.engines.common.identity import chat_template_digest, tokenizer_digest, weights_digest
from rollout_wal.engines.hf.weights import own_memory, parameters

from ..errors import BadConfiguration, TeacherFailed, problem
from .base import TeacherInfo
from .folder import ModelFolder, checkpoint_digest, vocabulary
from .hf_teacher import HfTeacher
from .weights import PRECISIONS, freeze, load_model, loaded_bytes

__all__ = [
    "PRECISIONS",
    "HfTeacher",
    "HfTeacherSource",
    "SnapshotSource",
    "checkpoint_digest",
    "freeze",
    "loaded_bytes",
]


class HfTeacherSource:
    """A model folder.

    The digest of its weights is taken once, here. If the files change, loading it again takes it anew, and refuses
    weights that are not those whose scores have been given out.

    Args:
        teacher: its id.
        folder: written by save_pretrained, or packed by `rollout-wal quantize`.
        precision: "float32", "bfloat16", "mxfp4" (bfloat16 arithmetic) or "mxfp4-float32".
        domains: labels that are routed to it.
        token_budget: tokens of a forward, padding included.
        chunk_tokens: columns of a forward; a longer sequence is forwarded in pieces of that many.
        share_prefixes: forward a context that several items have in common once.
    """

    def __init__(
        self,
        teacher: str,
        folder: Path | str,
        *,
        precision: str = "bfloat16",
        domains: Sequence[str] = (),
        device: str = "cpu",
        token_budget: int = 8192,
        chunk_tokens: int = 4096,
        share_prefixes: bool = True,
    ) -> None:
        self.folder, self.precision = Path(folder), precision
        self.device, self.token_budget, self.chunk_tokens = torch.device(device), token_budget, chunk_tokens
        self.share_prefixes = share_prefixes
        if precision not in PRECISIONS or not (self.folder / "config.json").is_file():
            raise BadConfiguration(
                problem(
                    f"teacher {teacher!r}: precision {precision!r} of {self.folder}",
                    consequence="It was not registered",
                    remedy=f"Name a folder with a config.json, and one of {', '.join(PRECISIONS)}",
                )
            )
        self._files = ModelFolder(teacher, self.folder, precision)
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        self.info = TeacherInfo(
            self._files.provenance,
            vocabulary(config, self.folder),
            config.max_position_embeddings,
            config.hidden_size,
            loaded_bytes(self.folder, precision),
            tuple(domains),
        )

    def load(self) -> HfTeacher:
        """Raises TeacherFailed or ScoreProvenanceMismatch."""
        teacher = self.info.id
        try:
            self._files.check_unchanged()
            model = load_model(self.folder, self.precision)
            if self.device.type == "cpu":
                own_memory(model)
            else:
                model = model.to(self.device)
            self._files.check_unchanged()  # and not while it was read either
            return HfTeacher(model, self.info, self.token_budget, self.chunk_tokens, share_prefixes=self.share_prefixes)
        except (OSError, ValueError, RuntimeError, KernelError, SafetensorError) as error:
            raise TeacherFailed(
                problem(
                    f"teacher {teacher!r} cannot be loaded from {self.folder}: {error}",
                    consequence="Items that ask for it fail; other teachers are not affected",
                    remedy="Repair the folder, then send the items again",
                )
            ) from error


class SnapshotSource:
    """The student itself, as it is now, as a teacher: a frozen copy that later updates do not reach.

    Args:
        model: a transformers causal LM.
        tokenizer_folder: where its tokenizer is, for the digests.
    """

    def __init__(
        self,
        teacher: str,
        model: nn.Module,
        *,
        tokenizer_folder: Path | str,
        domains: Sequence[str] = (),
        token_budget: int = 8192,
        chunk_tokens: int = 4096,
    ) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._budget, self._chunk = token_budget, chunk_tokens
        folder = Path(tokenizer_folder)
        config = self._model.config.get_text_config()  # type: ignore[union-attr, operator]
        parameter = next(self._model.parameters())
        provenance = Provenance(
            teacher,
            weights_digest(parameters(self._model)),
            tokenizer_digest(folder),
            chat_template_digest(folder),
            str(parameter.dtype).removeprefix("torch."),
        )
        self.info = TeacherInfo(
            provenance,
            vocabulary(config, folder),
            config.max_position_embeddings,
            config.hidden_size,
            sum(p.nbytes for p in self._model.parameters()),
            tuple(domains),
        )

    def load(self) -> HfTeacher:
        return HfTeacher(self._model, self.info, self._budget, self._chunk, owned=False)
