"""What other libraries do that is nobody's wish here."""

from __future__ import annotations

import logging


def quiet_imports() -> None:
    """transformers imports torchao where it is installed, and both talk about it at length in every process."""
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
