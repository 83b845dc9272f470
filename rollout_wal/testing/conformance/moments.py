"""Where a worker is killed: hooks around its engine and its log that end the process at a named moment.

The hooks run in the worker, because only the worker knows how far it is. They are put there by the engine's factory:
`killable` turns any EngineSpec into one that builds the same engine with the hooks around it. A plan is a file that
names one moment for each life; the hooks look at it at every step, so it can be laid while the worker runs. Before it
dies a process writes a mark: a test that passes without its kill having happened would show nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from ...backend import EngineSpec
from ...engine_log import EngineLog
from ...engines.base import Engine, Request, StepOutput
from ...records import RecordType
from ...step import decode_step

#: name -> when the process dies
MOMENTS: Final[dict[str, str]] = {
    "first_token": "requests have been added, and no token of them has been sampled",
    "prefill": "a prompt, or the tokens of a resume, have been computed, and what was drawn from them is not logged",
    "sampled": "a step has been computed and is not logged",
    "appended": "a step is in the log and not durable",
    "durable": "a step is durable, and nobody has been told",
    "end_sampled": "the last token of a rollout has been sampled and is not logged",
    "end_appended": "the last token is in the log and not durable",
    "end_durable": "the last token is durable, and nobody has been told",
    "update_begun": "new weights are about to be loaded",
    "update_loaded": "new weights have been loaded, and nobody has been told",
    "update_logged": "the new policy version is in the log, and nobody has been told",
}
_FACTORY: Final = "rollout_wal.testing.conformance.moments:build"
_NEVER: Final = ("", 0)
#: The process that forks workers imports the factory's module, once for all of them: this one. It names the engine's
#: own, which takes seconds to import, and which every life would import again.
_PRELOAD: Final = "ROLLOUT_WAL_CONFORMANCE_PRELOAD"
if os.environ.get(_PRELOAD):
    import_module(os.environ[_PRELOAD])


class Plan:
    """One moment per life, as "moment:count" (die at the count-th time it comes to that), in the order of lives.

    Args:
        folder: shared by the test and the workers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "plan"

    def lay(self, *lives: tuple[str, int]) -> None:
        """Kill the next lives at these moments. Whoever runs now is the first of them.

        Raises:
            ValueError: an unknown moment.
        """
        if unknown := {moment for moment, _ in lives} - set(MOMENTS):
            raise ValueError(f"unknown moments {sorted(unknown)}; there are {sorted(MOMENTS)}")
        for mark in self.folder.glob("killed.*"):
            mark.unlink()
        text = "\n".join(f"{moment}:{count}" for moment, count in lives)
        temporary = self.folder / "plan.tmp"
        temporary.write_text(text)
        os.replace(temporary, self._file)

    def killed(self) -> list[str]:
        """The moments at which a process has died since the plan was laid."""
        marks = sorted(self.folder.glob("killed.*"), key=lambda mark: int(mark.suffix[1:]))
        return [mark.read_text() for mark in marks]

    def next(self) -> tuple[tuple[str, int], int, int]:
        """(moment, count), the number of lives that are over, and the plan's identity; in the worker."""
        try:
            identity = os.stat(self._file).st_mtime_ns
            lives = self._file.read_text().split()
        except FileNotFoundError:
            return _NEVER, 0, 0
        over = len(list(self.folder.glob("killed.*")))
        if over >= len(lives):
            return _NEVER, over, identity
        moment, _, count = lives[over].partition(":")
        return (moment, int(count)), over, identity

    def die(self, moment: str, life: int) -> None:
        """Write the mark and end this process as a kernel out of memory would."""
        mark = self.folder / f"killed.{life}"
        temporary = self.folder / f"mark.{life}"
        temporary.write_text(moment)
        os.replace(temporary, mark)
        os.kill(os.getpid(), signal.SIGKILL)


def killable(spec: EngineSpec, plan: Plan) -> EngineSpec:
    """The same engine, killed by the plan. The plan's folder must exist."""
    options = {"spec": spec.to_message(), "plan": str(plan.folder)}
    return replace(spec, factory=_FACTORY, options=options)


@contextmanager
def preloaded(spec: EngineSpec) -> Iterator[None]:
    """Start a backend of a killable engine within this: its workers then start as fast as any."""
    before = os.environ.get(_PRELOAD)
    os.environ[_PRELOAD] = spec.module
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PRELOAD]
        else:
            os.environ[_PRELOAD] = before


def build(model: str, *, policy_version: int, spec: dict[str, Any], plan: str) -> Engine:
    """The factory of a killable engine; in the worker only: it hooks this process's logs too."""
    engine = EngineSpec.from_message({**spec, "model": model}).build(policy_version)
    return _Hooks(Plan(Path(plan))).around(engine)


class _Hooks:
    """Counts the moments of one process, and ends it at the planned one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._identity = -1
        self._counts: dict[str, int] = {}
        self._updating = False
        self._entered: set[int] = set()
        """Slots that have been added and have not produced a row."""

    def at(self, moment: str) -> None:
        """It has come to this moment."""
        (planned, count), life, identity = self._plan.next()
        if identity != self._identity:
            self._identity, self._counts = identity, {}
        self._counts[moment] = self._counts.get(moment, 0) + 1
        if moment == planned and self._counts[moment] >= count:
            self._plan.die(moment, life)

    def around(self, engine: Engine) -> Engine:
        """The engine itself, of a class derived from its own: what it is an instance of, it stays."""
        cls: type[Any] = type(engine)
        hooks = self

        def add(self: Any, request: Request, *rest: Any, **named: Any) -> Any:
            out = cls.add(self, request, *rest, **named)
            hooks._entered.add(request.slot)
            return out

        def abort(self: Any, slot: int) -> None:
            hooks._entered.discard(slot)
            cls.abort(self, slot)

        def step(self: Any) -> StepOutput:
            if hooks._entered:
                hooks.at("first_token")
            out: StepOutput = cls.step(self)
            produced = set(out.slot_N.tolist())
            if hooks._entered:
                hooks.at("prefill")
            hooks._entered -= produced
            if produced:
                hooks.at("sampled")
            if (out.finish_N != 0).any():
                hooks.at("end_sampled")
            return out

        def load_weights(self: Any, source: Any, version: int) -> None:
            hooks.at("update_begun")
            hooks._updating = True
            cls.load_weights(self, source, version)
            hooks.at("update_loaded")

        derived = type(cls.__name__, (cls,), {"__slots__": (), **_named(add, abort, step, load_weights)})
        cast(Any, engine).__class__ = derived
        self._around_log()
        return engine

    def _around_log(self) -> None:
        """The log is hooked by class: the worker makes its own. Whoever forked this process is not touched."""
        append_step, take_durable, policy = EngineLog.append_step, EngineLog.take_durable, EngineLog.policy
        log_cls: Any = EngineLog
        hooks = self

        def appended(self: EngineLog, slot_R: Any, token_N: Any, finish_R: Any, *rest: Any, **named: Any) -> int:
            lsn = append_step(self, slot_R, token_N, finish_R, *rest, **named)
            hooks.at("appended")
            if (finish_R != 0).any():
                hooks.at("end_appended")
            return lsn

        def taken(self: EngineLog) -> list[Any]:
            frames = take_durable(self)
            steps = [decode_step(f.payload) for f in frames if f.type == RecordType.STEP]
            if steps:
                hooks.at("durable")
            if any((step.finish_R != 0).any() for step in steps):
                hooks.at("end_durable")
            return frames

        def logged(self: EngineLog, version: int, weights_digest: str, source: str = "") -> int:
            lsn = policy(self, version, weights_digest, source)
            if hooks._updating:  # a worker that starts says under which weights, too
                hooks._updating = False
                hooks.at("update_logged")
            return lsn

        log_cls.append_step, log_cls.take_durable, log_cls.policy = appended, taken, logged


def _named(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f.__name__: f for f in functions}
