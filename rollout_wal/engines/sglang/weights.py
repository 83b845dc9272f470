"""Which weights a scheduler has, and that no token is logged under others.

Every update must name its version by a number. Tokens of a step that was computed before the update and is appended
after it (overlapped scheduling) keep the version that they were drawn under.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import ArchitectureMismatch, BadInput
from ..common.checkpoint import Checkpoint, quick_digest, same_architecture, same_shapes
from ..common.step_log import DECLARED
from .rollouts import Rollouts

Declare = Callable[[int, str, str], None]
"""Logs version, digest and source of the weights that the next tokens are of."""


def is_number(version: Any) -> bool:
    return re.fullmatch(r"\d{1,18}", str(version)) is not None


class Weights:
    """The weights of one scheduler.

    Args:
        folder: what the server was started with; updates from disk must be of the same architecture and shapes.
        digest: of these.
        declare: called once for each version, before its first token is logged.
    """

    def __init__(self, folder: Path, version: int, digest: str, rollouts: Rollouts, declare: Declare) -> None:
        self._folder = folder
        self._rollouts = rollouts
        self._declare = declare
        self._undeclared: tuple[int, str, str] | None = None
        """In force, and no token of them has been logged yet."""
        self.of_kv: tuple[int, str] | None = (version, digest)
        """Version and digest of the weights that all cached KV is of; None while that is not known."""
        rollouts.version = version

    def refusal(self, version: str | None, source: str) -> str | None:
        """Why weights cannot be replaced by these, under this version, or None."""
        if source and Path(source).is_dir():
            # SGLang looks at neither names nor shapes, and rolls back from the very folder that has failed.
            try:
                same_architecture(self._folder, Path(source))
                same_shapes(Checkpoint(self._folder).shapes(), Checkpoint(Path(source)).shapes())
            except (ArchitectureMismatch, BadInput) as error:
                return str(error)
        if version is None or not is_number(version):
            return (
                f"weight_version={version!r} is no number. The weights were not replaced: every token is logged with "
                "the number of its policy. Pass weight_version as digits, '17' say"
            )
        return None

    def updated(self, version: str, source: str, flushed: bool) -> None:
        """The weights have changed: said before a token is sampled under them.

        Args:
            flushed: no KV of the weights before is left.
        """
        folder, before = Path(source), str(self._rollouts.version)
        digest = quick_digest(folder) if source and folder.is_dir() else f"{DECLARED}{version}"
        # KV that was not flushed is of the old weights, and nobody can tell it from what comes.
        self.of_kv = (int(version), digest) if flushed else None
        if int(version) == self._rollouts.version:
            return
        self._rollouts.version = int(version)
        self._undeclared = (int(version), digest, source)
        # Overlapped: a step of the old weights may be on its way still, and its tokens are theirs. Those of requests
        # that were retracted meanwhile are thrown away, and drawn again under the new weights.
        late = [r for r in self._rollouts.by_rid.values() if r.drawn and not r.req.is_retracted]
        for rollout in late:
            _count_late(rollout.req, len(rollout.drawn), before)
        if not late:
            self._say()

    def logging(self, version: int) -> None:
        """Tokens of this version are about to be appended."""
        if self._undeclared is not None and version == self._undeclared[0]:
            self._say()

    def _say(self) -> None:
        assert self._undeclared is not None
        self._declare(*self._undeclared)
        self._undeclared = None


def _count_late(req: Any, late: int, version: str) -> None:
    """SGLang's spans end at what was appended when the weights changed; these tokens were drawn before, too."""
    from sglang.srt.utils.weight_versions import WeightVersionEvent

    count = len(req.output_ids)
    events = req.weight_version_events
    if events and events[-1].num_output_tokens == count and events[-1].old_version == version:
        events.pop()
    events.append(WeightVersionEvent(old_version=version, num_output_tokens=count + late))
