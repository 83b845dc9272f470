"""The embedded engine. Needs torch and transformers (extra "hf")."""

from ...errors import MissingExtra

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtra(error.name or "torch", "hf", "The embedded engine") from error

from ..common.identity import architecture_digest, chat_template_digest, tokenizer_digest, weights_digest
from .engine import HFEngine
from .kv import RequestKv
from .weights import parameters

__all__ = [
    "HFEngine",
    "RequestKv",
    "architecture_digest",
    "chat_template_digest",
    "parameters",
    "tokenizer_digest",
    "weights_digest",
]
