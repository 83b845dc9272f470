"""Logging inside an engine's own process: each step is appended before its outputs may leave, and they wait for it.

    bound = log.bind(rollout)                  # once per request: its slot, and what is logged of it already
    lsn = log.append(slot_R, token_N, ...)     # once per step, as the step's results come in
    log.hold(outputs, lsn)                     # instead of handing them on
    for outputs in log.take(): ...             # those whose records are durable by now

The sync runs while the next step computes. An engine that has nothing more to compute calls `flush` instead.
Not thread-safe: the engine's loop drives it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...engine_log import EngineLog
from ...engine_state import EngineState
from ...errors import BadInput, UndeclaredWeights, problem
from ...log.policy import SyncPolicy
from ...log.storage import make_dirs_durable
from ...wal import open_engine_log
from ..base import FinishReason
from .logged import Logged, combine
from .routes import shape_of

Held = TypeVar("Held")

DECLARED = "declared:"
"""Begins a weights digest that nobody computed: the version was declared, and that is all that is known."""


@dataclass(frozen=True, slots=True)
class Bound:
    """An attempt that has a slot."""

    slot: int
    attempt: int
    logged: Logged
    """What earlier attempts left durable: what this one goes on from."""


class StepLog(Generic[Held]):
    """See the module. Build it with `open`.

    Args:
        keep: how many rollouts that have ended, or that nobody runs, stay in the log after their last row. The oldest
            beyond that are forgotten, and can then no longer be resumed or asked for. What is kept takes about 20 bytes
            of memory for each token.
    """

    def __init__(self, log: EngineLog, *, keep: int = 10_000) -> None:
        self._log = log
        self._log.held = deque()
        self._state: EngineState = log.state
        self._rollout_at: dict[int, tuple[int, int]] = {}
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        self._next_slot = 0
        self._attempts: dict[int, list[int]] = {}
        for rollout, attempt in sorted(self._state.streams):
            self._attempts.setdefault(rollout, []).append(attempt)
        self._keep = keep
        self._idle: dict[int, None] = dict.fromkeys(self._attempts)
        self._outputs: deque[tuple[int, Held]] = deque()
        self._lsn = 0

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        info: Mapping[str, Any],
        policy_version: int,
        weights_digest: str,
        source: str = "",
        segment_bytes: int = 64 << 20,
        policy: SyncPolicy | None = None,
        take_over: bool = False,
        keep: int = 10_000,
    ) -> StepLog[Held]:
        """Own the log at `path`, recover it, and say who samples from here on. Durable when this returns.

        A predecessor that is still ending is waited for, and fenced if it does not end.

        Args:
            info: of the engine, plain types: `backend.worker.info_message` of an EngineInfo, say.
            policy_version: of the weights as they are loaded.

        Raises:
            UndeclaredWeights: the log knows this version with other weights.
            LogOwned, LogDamaged, LogTooNew, LogPoisoned: see `Log.open`.
        """
        make_dirs_durable(Path(path))
        log = open_engine_log(Path(path), segment_bytes, policy or SyncPolicy(), take_over=take_over)
        try:
            last = log.state.policy
            if last is not None and last.version == policy_version and _differ(last.weights_digest, weights_digest):
                raise UndeclaredWeights(
                    problem(
                        f"policy version {policy_version} was logged with weights {last.weights_digest}, and the "
                        f"engine has {weights_digest}",
                        consequence="The engine was not started: tokens of two policies would carry one version",
                        remedy="Start it with the weights of that version, or name the version that these are",
                    )
                )
            out: StepLog[Held] = cls(log, keep=keep)
            log.engine(dict(info))
            log.policy(policy_version, weights_digest, source)
            out.flush()
            return out
        except BaseException:
            log.close()
            raise

    # -- requests -----------------------------------------------------------------------------------------------

    def bind(self, rollout: int, attempt: int | None = None, *, start: int | None = None) -> Bound:
        """Give an attempt a slot. The rollout's earlier attempt, if it runs, is cut off: its rows must not be appended.

        Args:
            attempt: its number where a front end keeps attempts; None: the one after the last that is logged.
            start: output tokens that precede its first row; None: what is logged here.

        Raises:
            BadInput: an attempt that is not newer than one that the log knows, or a number that no record holds.
                Nothing was changed, and an attempt that runs goes on.
        """
        number = self.check_attempt(rollout, attempt)
        logged = self.logged(rollout)
        cut_off = self._slot_of.get(rollout)
        slot = cut_off if cut_off is not None else self._free[-1] if self._free else self._next_slot
        self._lsn = self._log.bind(slot, rollout, number, len(logged) if start is None else start)
        if slot == self._next_slot:
            self._next_slot += 1
        elif cut_off is None:
            self._free.pop()
        self._rollout_at[slot] = (rollout, number)
        self._slot_of[rollout] = slot
        self._attempts.setdefault(rollout, []).append(number)
        self._idle.pop(rollout, None)
        return Bound(slot, number, logged)

    def check_attempt(self, rollout: int, attempt: int | None) -> int:
        """The number that an attempt would have, without beginning it.

        Raises:
            BadInput: one that is not newer than what the log knows.
        """
        last = max(self._attempts.get(rollout, [0]))
        if attempt is not None and attempt <= last:
            raise BadInput(
                problem(
                    f"attempt {attempt} of rollout {rollout} is not newer than attempt {last}, which is in the log",
                    consequence="It was not begun: what it sampled would be ignored by every recovery",
                    remedy="Number attempts upwards from what the log holds, or leave the number out",
                )
            )
        return last + 1 if attempt is None else attempt

    def release(self, rollout: int) -> None:
        """The rollout runs no longer: it ended, or was aborted or cut off. What it logged stays, for a resume."""
        slot = self._slot_of.pop(rollout, None)
        if slot is None:
            return
        del self._rollout_at[slot]
        self._free.append(slot)
        self._idle.pop(rollout, None)
        self._idle[rollout] = None
        if len(self._idle) > self._keep:
            self.forget([next(iter(self._idle))])

    def owner(self, slot: int) -> tuple[int, int] | None:
        """(rollout, attempt) that has the slot."""
        return self._rollout_at.get(slot)

    def logged(self, rollout: int) -> Logged:
        """What is durable of a rollout, over all attempts."""
        attempts = self._attempts.get(rollout)
        if not attempts:
            return combine(rollout, [])
        self.flush()
        streams = self._state.finish().streams
        mine = [streams[rollout, a] for a in attempts if (rollout, a) in streams]
        return combine(rollout, mine, shape_of(self._state.engine))

    def rollouts(self) -> list[int]:
        """Those that the log knows."""
        return list(self._attempts)

    def forget(self, rollouts: Iterable[int]) -> None:
        """Nobody needs these any longer. Running ones are left out."""
        gone = [r for r in rollouts if r not in self._slot_of and r in self._attempts]
        for rollout in gone:
            del self._attempts[rollout]
            self._idle.pop(rollout, None)
        if gone:
            self._log.forget(gone)
            self._log.clean()

    # -- steps --------------------------------------------------------------------------------------------------

    def append(
        self,
        slot_R: NDArray[np.uint16],
        token_N: NDArray[np.uint32],
        finish_R: NDArray[np.uint8],
        logprob_N: NDArray[np.float32] | None = None,
        sampling_logprob_N: NDArray[np.float32] | None = None,
        *,
        count_R: NDArray[np.uint16] | None = None,
        named: Mapping[int, NDArray[Any]] | None = None,
    ) -> int:
        """Log one step, and have it synced in the background. Rows that end are released. Returns its LSN."""
        self._lsn = self._log.append_step(
            slot_R, token_N, finish_R, logprob_N, sampling_logprob_N, count_R=count_R, named=named
        )
        self._log.sync_soon()
        if finish_R.any():
            for slot in slot_R[finish_R != FinishReason.RUNNING].tolist():
                self.release(self._rollout_at[slot][0])
        return self._lsn

    def hold(self, outputs: Held, lsn: int | None = None) -> None:
        """Keep outputs until what justifies them (`lsn`; default: all that is appended) is durable."""
        self._outputs.append((self._lsn if lsn is None else lsn, outputs))

    @property
    def holding(self) -> bool:
        return bool(self._outputs)

    def take(self) -> list[Held]:
        """The held outputs that may leave now, in order. Does not wait.

        Raises:
            LogPoisoned, LogFenced: nothing that is held may ever leave.
        """
        self._absorb()
        durable, out = self._log.durable_lsn, []
        while self._outputs and self._outputs[0][0] <= durable:
            out.append(self._outputs.popleft()[1])
        return out

    def flush(self) -> None:
        """Wait until everything appended is durable. `take` then hands out all that is held."""
        self._log.wait_durable()
        self._absorb()

    # -- what else happens to an engine ---------------------------------------------------------------------------

    def policy(self, version: int, weights_digest: str, source: str = "") -> None:
        """The weights have changed: what is sampled from here on is of this version. Durable when this returns."""
        self._lsn = self._log.policy(version, weights_digest, source)
        self.flush()

    def snapshot(self, rollout: int, tokens: int, key: str) -> None:
        """The KV of a running rollout is durable up to `tokens` (prompt included). Never before it is."""
        if rollout in self._slot_of:
            self._lsn = self._log.snapshot(rollout, self._attempts[rollout][-1], tokens, key)

    @property
    def policy_version(self) -> int:
        self._absorb()
        return self._state.policy.version if self._state.policy is not None else 0

    def close(self) -> None:
        """Everything appended is durable; held outputs that nobody took are not lost, the log has their tokens."""
        self._log.wait_durable()
        self._log.close()

    def _absorb(self) -> None:
        """Follow what has become durable, so that a resume in this same process finds it."""
        for frame in self._log.take_durable():
            self._state.apply(frame)


def _differ(a: str, b: str) -> bool:
    return a != b and not a.startswith(DECLARED) and not b.startswith(DECLARED)
