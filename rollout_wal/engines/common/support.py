"""What an adapter needs of its engine: a version in the tested range, and hooks that are where they were.

An adapter that overrides a method which its engine no longer calls logs nothing, and nobody notices until something is
lost. So every hook is looked up, with its parameters, before the engine starts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...errors import HookMoved, UnsupportedEngine, problem


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of an engine that its adapter supports: low <= version < high, each as "major.minor[.patch]"."""

    low: str
    high: str

    def __str__(self) -> str:
        return f">={self.low},<{self.high}"

    def __contains__(self, version: object) -> bool:
        return isinstance(version, str) and _release(self.low) <= _release(version) < _release(self.high)


@dataclass(frozen=True, slots=True)
class Hook:
    """Something of an engine's own that its adapter overrides, wraps or calls.

    Args:
        path: "module:Class.attribute".
        parameters: its parameters must begin with these names, `self` included; None: it need only be there.
    """

    path: str
    parameters: tuple[str, ...] | None = None

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        module, _, attributes = self.path.partition(":")
        try:
            target: Any = import_module(module)
            for name in attributes.split("."):
                target = inspect.getattr_static(target, name)
        except (ImportError, AttributeError) as error:
            return f"{self.path} is gone ({error})"
        if self.parameters is None:
            return None
        if isinstance(target, (staticmethod, classmethod)):
            target = target.__func__
        found = tuple(inspect.signature(target).parameters)
        if found[: len(self.parameters)] == self.parameters:
            return None
        return f"{self.path} takes ({', '.join(found)}) instead of ({', '.join(self.parameters)}, ...)"


def check_version(engine: str, found: str, supported: Versions) -> None:
    """Refuse a version outside of the range.

    Raises:
        UnsupportedEngine: names the range.
    """
    if found not in supported:
        raise UnsupportedEngine(
            problem(
                f"{engine} {found} is installed; this version of rollout-wal supports {engine} {supported}",
                consequence="The engine was not started: its hooks may have moved, and tokens would go unlogged",
                remedy=f"Install a version of {engine} in that range, or a rollout-wal that supports {found}",
            )
        )


def check_hooks(engine: str, found: str, hooks: Iterable[Hook]) -> None:
    """Look all hooks up.

    Raises:
        HookMoved: names each one that is gone or takes other parameters.
    """
    faults = [fault for hook in hooks if (fault := hook.fault()) is not None]
    if faults:
        raise HookMoved(
            problem(
                f"{engine} {found} has moved what rollout-wal hooks into: {'; '.join(faults)}",
                consequence="The engine was not started: tokens would leave it without being logged",
                remedy="Use a released version of the engine in the supported range; if this is one, report it",
            )
        )


def _release(version: str) -> tuple[int, ...]:
    """The release part of a version: (0, 32, 0) of "0.32.0rc1+cpu"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
