"""Between an engine and a store: what is saved when, and what a resumed rollout gets back.

Nothing here may stop a rollout: every failure is logged with its reason, counted, and ends in a prefill.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine, Request
from ..errors import BadInput, KvError, problem
from .engine import SupportsKv
from .hashing import Chain, Run, extend
from .index import Manifest
from .layout import KvArrays, KvLayout, KvMismatch
from .metrics import Loaded
from .store import KvStore

log = logging.getLogger(__name__)

#: Finished rollouts, and seconds, after which the store is collected.
_COLLECT_FINISHED = 64
_COLLECT_S = 30.0
_SLOTS = 1 << 16


@dataclass(frozen=True, slots=True)
class KvConfig:
    """How KV snapshots are kept.

    Args:
        path: directory of the store; one per job, shared by its workers.
        index: directory of the index, local to this machine; inside `path` if not given.
        codec: "raw", "planes" or "auto" (measured).
        block_tokens: tokens of a block. Snapshots made with another size are not found.
        every_tokens: also save each rollout in the background after this many tokens; 0: only on preemption.
        budget_bytes: the most that the store should take.
        grace_s: how long saving may take on preemption.
        on_update: what becomes of the KV when the weights change: "recompute" it, or "keep" decoding on the old, which
            the engine's record in the log then says.
    """

    path: str
    index: str | None = None
    codec: str = "auto"
    block_tokens: int = 64
    every_tokens: int = 0
    budget_bytes: int | None = 64 << 30
    grace_s: float = 5.0
    on_update: Literal["recompute", "keep"] = "recompute"

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, good in (
                ("codec", self.codec in {"auto", "raw", "planes"}),
                ("block_tokens", self.block_tokens >= 1),
                ("every_tokens", self.every_tokens >= 0),
                ("grace_s", self.grace_s >= 0),
                ("on_update", self.on_update in {"recompute", "keep"}),
            )
            if not good
        ]
        if wrong:
            raise BadInput(
                problem(
                    f"KV snapshots cannot be kept with {', '.join(f'{n}={getattr(self, n)!r}' for n in wrong)}",
                    consequence="Nothing was started",
                    remedy="See KvConfig for what each may be",
                )
            )

    def to_message(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Resumed:
    """How a request was added. `reason` is "" where all of its KV came from the store."""

    loaded: int
    """Leading tokens of prompt and prefix whose KV was loaded."""
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshotted:
    """The KV of a rollout up to a position is durable."""

    rollout: int
    tokens: int
    key: str


class Snapshots:
    """See the module. Driven by the engine's thread; background saves run in one thread of their own.

    Args:
        alive: whether a rollout may still be resumed; asked from the background thread too.

    Raises:
        KvError: the engine describes a layout that is not known, or the store cannot be opened.
    """

    def __init__(self, config: KvConfig, engine: Engine, alive: Callable[[int], bool]) -> None:
        if not isinstance(engine, SupportsKv):
            raise KvError(
                problem(
                    f"the engine {engine.info.engine!r} cannot save and load KV",
                    consequence="Rollouts are resumed by prefill",
                    remedy="Give it the methods of rollout_wal.kv.SupportsKv",
                )
            )
        self._config = config
        self._kv: SupportsKv = engine
        self._engine = engine
        self._alive = alive
        layout = KvLayout.parse(engine.kv_layout())
        self._chain = Chain(layout, engine.info.architecture_digest, config.block_tokens)
        self._keep = config.on_update == "keep"
        if self._keep:
            engine.keep_kv()
        self.store = KvStore(
            config.path, index=config.index, codec=config.codec, budget_bytes=config.budget_bytes, threads=2
        )
        self._runs: dict[int, tuple[Run, ...]] = {}
        self._since_S = np.zeros(_SLOTS, np.int64)
        """Tokens of each slot since its last snapshot."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-save")
        self._saving: Future[list[Snapshotted]] | None = None
        self._collecting: Future[None] | None = None
        self._finished = 0
        self._collected_at = time.monotonic()

    @classmethod
    def open(cls, config: KvConfig, engine: Engine, alive: Callable[[int], bool]) -> Snapshots | None:
        """None, and a warning that says why, where KV cannot be kept."""
        try:
            return cls(config, engine, alive)
        except (KvError, OSError) as error:
            log.warning("no KV snapshots: %s", error)
            return None

    # -- resuming -----------------------------------------------------------------------------------------------

    def add(self, rollout: int, request: Request) -> Resumed:
        """Add a request to the engine, with as much of its KV as the store has.

        Raises: what `Engine.add` raises.
        """
        start = time.perf_counter()
        token_T = np.concatenate((request.prompt, request.prefix)).astype(np.int32)[:-1]
        runs = self._runs_of(rollout, len(token_T))
        loaded = Loaded(None, 0)
        if len(token_T):
            loaded = self.store.load(token_T, self._chain, runs, name=str(rollout))
        if loaded.arrays is not None:
            try:
                self._kv.add_with_kv(request, loaded.arrays)
            except KvError as error:
                reason = f"refused_{error.reason}" if isinstance(error, KvMismatch) else "refused"
                self.store.metrics.fallbacks[reason] += 1
                loaded = Loaded(None, 0, reason, str(error))
        if loaded.arrays is None:
            self._engine.add(request)
        count = loaded.tokens
        self._runs[rollout] = extend(runs, count, *self._weights())
        self._since_S[request.slot] = 0
        if loaded.reason not in {"", "partial"}:
            log.log(
                # Killed without notice: nothing could be saved, and nothing is wrong.
                logging.INFO if loaded.reason == "missing" and not count else logging.WARNING,
                "rollout %d: KV of %d of %d tokens was loaded, the rest is computed again (%s): %s",
                rollout,
                count,
                len(token_T),
                loaded.reason,
                loaded.detail,
            )
        return Resumed(count, time.perf_counter() - start, loaded.reason)

    def _runs_of(self, rollout: int, tokens: int) -> tuple[Run, ...]:
        """Under which weights saved KV of this rollout would have been computed, if it is to be used."""
        known: tuple[Run, ...] = ()
        if self._keep:
            manifest = self.store.manifest(str(rollout))
            known = manifest.runs if manifest is not None else ()
        return extend(known, tokens, *self._weights())

    def _weights(self) -> tuple[int, str]:
        return self._engine.policy_version, self._engine.info.weights_digest

    # -- saving -------------------------------------------------------------------------------------------------

    def save(self, running: Mapping[int, int]) -> list[Snapshotted]:
        """Save what is unfinished within the grace budget, the dearest to compute again first.

        Args:
            running: rollout -> slot.
        """
        until = time.monotonic() + self._config.grace_s
        self._settle()
        # Attention makes a prefill dearer than linear in its length, so the longest is also the dearest per token.
        tokens = {rollout: self._kv.kv_tokens(slot) for rollout, slot in running.items()}
        order = sorted((r for r in running if tokens[r]), key=lambda r: -tokens[r])
        exported = ((rollout, self._kv.save_kv(running[rollout])) for rollout in order)
        return self._write(exported, until)

    def stepped(self, slot_N: NDArray[np.uint16], rollout_at: Mapping[int, int]) -> None:
        """After each engine step: begin a background save where one is due."""
        every = self._config.every_tokens
        if not every:
            return
        self._since_S[slot_N] += 1
        due = slot_N[self._since_S[slot_N] >= every]
        if not len(due) or self._saving is not None:
            return
        exported = [(rollout_at[s], self._kv.save_kv(s)) for s in due.tolist() if s in rollout_at]
        self._since_S[due] = 0
        self._saving = self._thread.submit(self._write, iter(exported), None)

    def saved(self) -> list[Snapshotted]:
        """Background saves that have become durable since the last call."""
        if self._saving is None or not self._saving.done():
            return []
        saving, self._saving = self._saving, None
        return saving.result()

    def _write(self, exported: Iterator[tuple[int, KvArrays | None]], until: float | None) -> list[Snapshotted]:
        out = []
        try:
            for rollout, arrays in exported:
                if arrays is not None:
                    runs = extend(self._runs.get(rollout, ()), len(arrays), *self._weights())
                    self.store.save(str(rollout), arrays, self._chain, runs, until=until)
                if until is not None and time.monotonic() > until:
                    log.warning(
                        "KV snapshots: the grace time of %.1f s is over; the rest is prefilled", self._config.grace_s
                    )
                    self.store.metrics.fallbacks["grace"] += 1
                    break
            out = [Snapshotted(int(saved.name), saved.tokens, saved.key) for saved in self.store.commit()]
        except KvError as error:
            log.warning("KV snapshots: %s", error)
            self.store.metrics.fallbacks["save"] += 1
        return out

    # -- upkeep -------------------------------------------------------------------------------------------------

    def before_update(self, running: Mapping[int, int]) -> None:
        """The weights are about to change: remember what was computed under the old ones, if it is kept."""
        self._settle()
        for rollout, slot in running.items() if self._keep else ():
            self._runs[rollout] = extend(self._runs.get(rollout, ()), self._kv.kv_tokens(slot), *self._weights())

    def updated(self) -> None:
        """The weights have changed."""
        if not self._keep:
            self._runs.clear()
        self.collect()

    def finished(self, rollout: int) -> None:
        """A rollout is not running any more here."""
        self._runs.pop(rollout, None)
        self._finished += 1
        if self._finished >= _COLLECT_FINISHED and time.monotonic() - self._collected_at > _COLLECT_S:
            self.collect()

    def collect(self) -> None:
        """Collect garbage in the background: what is over, and what other weights have computed."""
        if self._collecting is None or self._collecting.done():
            self._finished, self._collected_at = 0, time.monotonic()
            self._collecting = self._thread.submit(self._collect, self._engine.policy_version)

    def _collect(self, version: int) -> None:
        def alive(manifest: Manifest) -> bool:
            current = self._keep or manifest.versions <= {version}
            return current and manifest.name.isdecimal() and self._alive(int(manifest.name))

        try:
            self.store.gc(alive)
        except KvError as error:
            log.warning("KV snapshots were not collected: %s", error)

    def _settle(self) -> None:
        """Wait for what runs in the background."""
        for future in (self._saving, self._collecting):
            if future is not None:
                future.exception()

    def close(self) -> None:
        self._thread.shutdown()
        self.store.close()
