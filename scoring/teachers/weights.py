"""The weights of a transformers model on disk: their size, loading them, a copy that nobody writes to."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rollout_kernels.model import load_packed_model, quantize_model_
from rollout_wal.engines.common.identity import chat_template_digest, tokenizer_digest
from rollout_wal.engines.hf.weights import no_progress_bars

from ..errors import BadConfiguration, problem
from .folder import checkpoint_digest

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "mxfp4": torch.bfloat16,
    "mxfp4-float32": torch.float32,
}
PRECISIONS = tuple(_DTYPES)


def load_model(folder: Path, precision: str) -> Any:
    """A transformers causal LM, on the CPU.

    Raises:
        OSError, ValueError, RuntimeError, KernelError, SafetensorError: it is not whole.
    """
    dtype = _DTYPES[precision]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    if precision.startswith("mxfp4") and packed:
        return load_packed_model(folder, dtype=dtype)
    with no_progress_bars():
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    if absent := sorted(map(str, {*loaded["missing_keys"], *loaded["mismatched_keys"]})):
        raise ValueError(f"its weights lack {len(absent)} tensors such as {absent[:3]}")
    if precision.startswith("mxfp4"):
        quantize_model_(model)
    return model.requires_grad_(False)


def freeze(folder: Path, keep: Path | None) -> Path:
    """A copy of a model folder that later writes to it do not reach, by the digest of what it is now.

    Args:
        keep: where copies are kept and found again; None: a temporary folder, gone with the process.

    Raises:
        BadConfiguration: the folder changes while it is copied, or there is no room for the copy.
    """
    if keep is None:
        temporary = tempfile.mkdtemp(prefix="scoring-frozen-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        keep = Path(temporary)
    try:
        digest = checkpoint_digest(folder)
        names = (digest, tokenizer_digest(folder), chat_template_digest(folder))
        frozen = keep / "frozen" / "-".join(name[:32] or "none" for name in names)
        if not frozen.is_dir():
            frozen.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=frozen.parent))
            skip = shutil.ignore_patterns("checkpoint-*", "optimizer*", "*.part")
            shutil.copytree(folder, part, ignore=skip, dirs_exist_ok=True)
            with contextlib.suppress(OSError):  # another server was faster
                part.rename(frozen)
        found = checkpoint_digest(frozen)
    except OSError as error:
        found, digest = str(error), "a copy"
    if found != digest:
        shutil.rmtree(frozen, ignore_errors=True)
        raise BadConfiguration(
            problem(
                f"{folder} cannot be frozen: {found} is not {digest}",
                consequence="Nothing was registered",
                remedy="Freeze it while nobody writes to it, and see that there is room for a copy",
            )
        )
    return frozen


def loaded_bytes(folder: Path, precision: str) -> int:
    """Memory that a model folder takes at a precision, from the files' headers alone.

    Weights that are packed on loading count as dense, for they are dense first. A folder that is packed already counts
    as packed, though loading it has the whole model dense for a moment.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, 100 << 20)))
            for entry in (header[name] for name in header if name != "__metadata__"):
                begin, end = entry["data_offsets"]
                dense = entry["dtype"] in ("F64", "F32", "F16", "BF16")
                total += math.prod(entry["shape"]) * _DTYPES[precision].itemsize if dense else end - begin
        except (ValueError, KeyError, TypeError):
            total += path.stat().st_size  # loading it will say what is wrong
    return total
