"""Numbers that callers pass, as Python's own: only those can be logged, sent to a worker, and be equal in a digest."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from ..errors import BadInput, problem


def whole(name: str, value: object) -> int:
    """A whole number; numpy's are taken too.

    Raises:
        BadInput: of another type. A float that happens to be whole is one, too: the next one may not be.
    """
    try:
        if isinstance(value, bool):  # an entry of a mask, as a rule
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BadInput(
            problem(
                f"{name} is {value!r:.100}, a {type(value).__name__}",
                consequence="Nothing was changed",
                remedy=f"Pass a whole number: int({name}), if that is what is meant",
            )
        ) from None


def rollout_ids(rollouts: Iterable[int]) -> list[int]:
    """Raises BadInput: no numbers."""
    return [whole("rollout", rollout) for rollout in rollouts]
