"""What callers call the policy versions, kept over the death of the host: verl counts a rollout's age in its steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from ...log.storage import make_dirs_durable, sync_directory

#: So many versions back, labels are kept.
KEPT: Final = 4096


class Labels:
    """In a file beside the logs, for no log has them. Damaged or gone, versions have no label until they get new ones.

    A host that dies before a label is written has not answered the call either, so the call comes again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "labels.json"
        self._labels: dict[int, int] = {}
        try:
            raw = json.loads(self._path.read_text())
            self._labels = {int(version): int(label) for version, label in raw.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            pass

    def set(self, version: int, label: int) -> None:
        """Durable when this returns."""
        if self._labels.get(version) == label:
            return
        self._labels[version] = label
        for old in sorted(self._labels)[:-KEPT]:
            del self._labels[old]
        make_dirs_durable(self._path.parent)
        temporary = self._path.with_name(".labels.partial")
        with temporary.open("w") as file:
            json.dump(self._labels, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path)
        sync_directory(self._path.parent)

    def all(self) -> dict[int, int]:
        """By policy version."""
        return dict(self._labels)
