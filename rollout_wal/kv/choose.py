"""Which codec is faster end to end on this disk: measured once per store, and remembered beside its files.

Raw blocks cost a write, a sync and a read; compressed ones cost fewer bytes of each, and the codec. The measurement
takes about a quarter of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .codec import Codec, decode, encode
from .data_files import open_direct, write_at
from .memory import aligned

_FILE: Final = "codec.json"
_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """Rates in bytes of raw KV per second."""

    codec: Codec
    disk: float
    encode: float
    decode: float
    ratio: float
    """Raw bytes per stored byte."""


def choose_codec(folder: Path) -> CodecChoice:
    """The choice that was made for this store, or a new one. Raises OSError: the disk refused."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / _FILE).read_text())
        return CodecChoice(**{**known, "codec": Codec[known["codec"]]})
    choice = measure(folder)
    text = json.dumps({**asdict(choice), "codec": choice.codec.name})
    temporary = folder / f".{_FILE}.{os.getpid()}"
    temporary.write_text(text)
    temporary.rename(folder / _FILE)
    return choice


def measure(folder: Path) -> CodecChoice:
    """Time the disk, and the codec on bf16 of normally distributed values."""
    normal = np.random.default_rng(0).standard_normal(_BYTES // 2, np.float32)
    raw = np.ascontiguousarray((normal.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
    start = time.perf_counter()
    stored = encode(raw, Codec.PLANES, 2)
    encoded = time.perf_counter()
    decode(stored, Codec.PLANES, 2, raw.nbytes)
    decoded = time.perf_counter()
    disk = _disk_rate(folder, raw)
    rates = raw.nbytes / (encoded - start), raw.nbytes / (decoded - encoded)
    ratio = raw.nbytes / stored.nbytes
    # Written once and read once; what the codec saves must pay for its two directions.
    saved = (1 - 1 / ratio) * 2 / disk
    codec = Codec.PLANES if saved > sum(1 / rate for rate in rates) else Codec.RAW
    return CodecChoice(codec, disk, *rates, ratio)


def _disk_rate(folder: Path, raw: NDArray[np.uint8]) -> float:
    """As the store writes: past the page cache where that works."""
    path = folder / f".probe.{os.getpid()}"
    data = aligned(raw.nbytes)[: raw.nbytes]
    data[:] = raw
    fd = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        start = time.perf_counter()
        write_at(fd, data.data, 0)
        os.fdatasync(fd)
        return data.nbytes / (time.perf_counter() - start)
    finally:
        os.close(fd)
        path.unlink()
