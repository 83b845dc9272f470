"""LM heads of teachers: fetched once, checked against the checkpoint that they should be of, kept.

A head and last-layer hidden states rebuild a teacher's logits at training time, which are far larger than both.
Shape legend: V = the teacher's vocabulary, H = its hidden size.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from rollout_wal.dataset import Provenance

from .. import wire
from ..errors import BadResult, problem
from ..items import check_provenance, provenance_fields
from ..v1 import scoring_pb2 as pb

_HEAD = "weight"


@dataclass(frozen=True, slots=True, eq=False)
class TeacherHead:
    """A teacher's LM head.

    Args:
        weight: [V, H], float32, or uint16 that are the bits of bfloat16.
        provenance: whose it is.
    """

    weight: NDArray[Any]
    provenance: Provenance

    @property
    def is_bfloat16(self) -> bool:
        return self.weight.dtype == np.uint16

    def tensor(self) -> Any:
        """As a torch tensor [V, H], float32 or bfloat16, for `scoring.losses.full_vocabulary_loss`."""
        import torch

        if not self.is_bfloat16:
            return torch.from_numpy(self.weight)
        return torch.from_numpy(self.weight.view(np.int16)).view(torch.bfloat16)


class HeadReader:
    """Puts a head together from the messages of `GetTeacherHead`.

    Args:
        teacher: how the server lists the teacher; the head must be of that shape.
        expected: what its provenance must be.
    """

    def __init__(self, teacher: pb.Teacher, expected: Provenance) -> None:
        self._teacher, self._expected = teacher, expected
        self._assembler: wire.Assembler | None = None
        self._provenance: Provenance | None = None
        self._whole = False
        self._said_crc32c = 0

    def add(self, message: pb.GetTeacherHeadResponse) -> None:
        """Raises BadResult, or ScoreProvenanceMismatch: the head of another checkpoint."""
        if message.HasField("provenance"):
            self._provenance = wire.read_provenance(message.provenance)
            check_provenance(self._provenance, self._expected)
        if self._assembler is None and message.chunks:
            dtype = pb.DTYPE_BFLOAT16 if message.chunks[0].dtype == pb.DTYPE_BFLOAT16 else pb.DTYPE_FLOAT32
            table = {pb.ARRAY_KIND_HEAD_WEIGHT: (_HEAD, dtype, 2)}
            self._assembler = wire.Assembler(table, 4 * self._teacher.vocabulary * self._teacher.hidden_size)
        if self._assembler is not None:
            self._assembler.add(message.chunks)
        if message.last:
            self._whole, self._said_crc32c = True, message.arrays_crc32c

    def head(self) -> TeacherHead:
        """Raises BadResult: cut short, of another shape, or holding what is no number."""
        arrays = self._assembler.arrays() if self._assembler is not None else {}
        weight: Any = arrays.get(_HEAD)
        shape = (self._teacher.vocabulary, self._teacher.hidden_size)
        wrong = None
        if weight is None or not self._whole or self._provenance is None:
            wrong = "it was cut short"
        elif self._assembler is None or self._assembler.crc32c != self._said_crc32c:
            wrong = f"its bytes do not have the checksum {self._said_crc32c:#010x} that the server sent"
        elif weight.shape != shape:
            wrong = f"it has shape {list(weight.shape)}, not {list(shape)}"
        elif not _finite(weight):
            wrong = "it holds NaN or infinity"
        if wrong or self._provenance is None:
            raise BadResult(
                problem(
                    f"the head of teacher {self._teacher.provenance.teacher!r} cannot be used: {wrong}",
                    consequence="It was dropped",
                    remedy="Ask again; if it comes back the same, that server is broken",
                )
            )
        return TeacherHead(weight, self._provenance)


class HeadFolder:
    """Heads on disk, by what they are of. Derived data: the folder may be deleted at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, provenance: Provenance) -> TeacherHead | None:
        """The head, or None: not there, damaged, or another's."""
        from safetensors import SafetensorError, safe_open

        path = self._path(provenance)
        try:
            with safe_open(path, framework="numpy") as file:
                weight = file.get_tensor(_HEAD)
                said = (file.metadata() or {}).get("crc32c")
        except (OSError, SafetensorError):
            return None
        if said != str(crc32c(np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data)):
            return None
        return TeacherHead(weight, provenance)

    def put(self, head: TeacherHead) -> None:
        """Keep a head; under another name first, so that one that is there is whole."""
        from safetensors.numpy import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(head.provenance)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        weight = np.ascontiguousarray(head.weight)
        checksum = crc32c(weight.reshape(-1).view(np.uint8).data)
        save_file({_HEAD: weight}, part, metadata={"crc32c": str(checksum), **provenance_fields(head.provenance)})
        part.replace(path)

    def _path(self, provenance: Provenance) -> Path:
        # A digest of the names, not the names: they come from outside.
        text = "\0".join(provenance_fields(provenance).values())
        return self._folder / f"head-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"


def _finite(weight: NDArray[Any]) -> bool:
    if weight.dtype == np.dtype("<u2"):
        return not bool(((weight & np.uint16(0x7F80)) == 0x7F80).any())
    return bool(np.isfinite(weight).all())
