"""What an engine must do beyond `Engine` for its KV to be saved and loaded. An engine that does not is prefilled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ..engines.base import Request
from .layout import KvArrays


@runtime_checkable
class SupportsKv(Protocol):
    """An engine whose KV can leave it and come back. Called between steps, by the thread that drives it."""

    def kv_layout(self) -> Mapping[str, Any]:
        """What it keeps, as `KvLayout.parse` reads it."""
        ...

    def kv_tokens(self, slot: int) -> int:
        """How many leading tokens of a slot are computed; 0 if it is unknown."""
        ...

    def keep_kv(self) -> None:
        """From now on `load_weights` leaves the KV of running requests as it is, and `info.extras` says so."""
        ...

    def save_kv(self, slot: int) -> KvArrays | None:
        """A copy of what is computed of a running slot, with the tokens it was computed over; None if nothing is."""
        ...

    def add_with_kv(self, request: Request, kv: KvArrays) -> None:
        """Like `add`, and compute only what `kv` does not hold. `kv` is shorter than the request.

        Raises: as `add`; KvMismatch: KV of another layout, and nothing was added.
        """
        ...
