"""Which SGLang this package was read and tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from ...errors import MissingExtra
from ..common.support import Versions, check_version

NAME: Final = "sglang"
#: Hooks move between patch releases of SGLang: what moved is found by reading and by tests, not by luck.
SUPPORTED: Final = Versions("0.5.23", "0.5.24")


def installed() -> str:
    """Raises MissingExtra: there is no SGLang."""
    try:
        return version(NAME)
    except PackageNotFoundError as error:
        raise MissingExtra(NAME, NAME, "The SGLang adapter") from error


def check() -> None:
    """Raises UnsupportedEngine: another version than the supported ones."""
    check_version(NAME, installed(), SUPPORTED)
