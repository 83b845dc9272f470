"""A trainer's weights as the backend's policy: in force when something is to be sampled under them, and only then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ...backend import RolloutBackend
from ...backend.weights import same_weights


class Weights:
    """Hands a trainer's weights to the backend. Also what TRL takes for its vLLM client.

    A policy version stays in force when the trainer dies, and what it had begun goes on under it. A trainer that starts
    from an earlier checkpoint has older weights than that. So it hands none over for a batch that the log has, and they
    get the next version, whatever step they are of, when there is something new to sample.

    Args:
        backend: gets them.
        gather: the weights as they are now, by name.
        settle: called before other weights come into force; waits for what is in flight.
    """

    def __init__(
        self, backend: RolloutBackend, gather: Callable[[], Mapping[str, Tensor]], settle: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._gather = gather
        self._settle = settle
        self._step: int | None = None
        """Of which optimizer step are those in force; None: this process does not know."""

    def sync_weights(self) -> None:
        """TRL asks for this before it generates, and does not know which batches the log has. `hand_over` is called
        by who does."""

    def hand_over(self, step: int) -> None:
        """Make the weights of optimizer step `step`, which are the trainer's now, the policy in force."""
        if step == self._step:
            return
        weights = self._gather()
        # At the start they may be in force already: those of the model folder, or those of a process before this one.
        # They are compared here: the backend can only find out by loading them, and kills workers that hold others.
        if self._step is not None or not same_weights(weights, Path(self._backend.policy.source)):
            self._settle()
            self._backend.update_weights(weights, self._backend.policy_version + 1)
        self._step = step

    def forget(self) -> None:
        """The trainer's weights may be others than after its last step."""
        self._step = None
