"""Group commit: append at once, wait for durability, and stop for good at the first I/O error.

`append` encodes a frame, hands it over and returns its LSN; it does no I/O. Whoever waits for an LSN leads the write
and the sync of everything that is pending, on its own thread: a hand-over to another thread costs half a sync. Those
who come meanwhile wait for the leader, and the first of them leads the next round. A background thread serves only
those who do not wait (`sync_soon`, and the awaitable twin).

After each sync the leader checks the fence, publishes the durable LSN, and only then acknowledges.

Whatever interrupts the leader, a full disk or Ctrl-C, leaves it unknown what the file holds: the writer is poisoned,
and everybody who waits is told. A child process that was forked gets a writer that refuses everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from ..errors import BadInput, LogFenced
from ..histogram import SYNC_S, Histogram
from . import refusals
from .active import ActiveSegment
from .awaiters import Awaiters
from .fence import Fence
from .format import DURABLE_MAGIC, SegmentHeader
from .marks import Mark, durable_name
from .pending import Batch, Pending
from .policy import SyncPolicy
from .storage import File, Storage


class LogWriter:
    """The one writer of a log. Thread-safe.

    Args:
        header: identity and epoch of the log, and where it goes on: `first_lsn` is the next LSN, `sequence` the last
            sequence in use, the predecessor fields what the next segment shall name.
        file, offset: the open segment to go on in, or None: the first append creates one. A segment that another
            owner wrote is never appended to.
        on_durable: called with the durable LSN after each acknowledgement, on the leader's thread; must not block.
    """

    def __init__(
        self,
        storage: Storage,
        fence: Fence,
        header: SegmentHeader,
        *,
        file: File | None = None,
        offset: int = 0,
        segment_bytes: int = 64 << 20,
        policy: SyncPolicy | None = None,
        prepare_ahead: bool = True,
        on_durable: Callable[[int], None] | None = None,
    ) -> None:
        self._storage = storage
        self._fence = fence
        last = header.predecessor_sequence if file is None else header.sequence
        self._active = ActiveSegment(storage, file, last, segment_bytes)
        self._pending = Pending(header, fence.epoch, offset=offset, segment_bytes=segment_bytes, open=file is not None)
        self._policy = policy or SyncPolicy()
        self._on_durable = on_durable
        self._mark = Mark(storage, durable_name(header.epoch), DURABLE_MAGIC, header.log_id)

        self._durable = header.first_lsn - 1
        self._error: BaseException | None = None
        self._closed = False
        self._prepare_ahead = prepare_ahead
        self.bytes_written = 0
        self.syncs = 0
        self.sync_s = Histogram(SYNC_S)
        """How long each sync took."""
        self._begin_threads()
        _WRITERS.add(self)

    def _begin_threads(self) -> None:
        """What belongs to the threads of one process."""
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._leading = 0
        """Identity of the thread that writes and syncs now; 0 for none."""
        self._waiters = 0
        self._awaiters = Awaiters()
        self._flusher: threading.Thread | None = None
        self._flush_wanted = threading.Event()
        self._active.forked()

    # -- what callers see ---------------------------------------------------------------------------------------

    @property
    def durable_lsn(self) -> int:
        """Everything at or below it is on disk, and this writer still owned the log after the sync."""
        return self._durable

    @property
    def last_lsn(self) -> int:
        return self._pending.next_lsn - 1

    @property
    def pending_bytes(self) -> int:
        return self._pending.bytes

    @property
    def poisoned(self) -> BaseException | None:
        """The first error, after which nothing is accepted."""
        return self._error

    @property
    def segment(self) -> SegmentHeader:
        """The segment that the last append went to."""
        return self._pending.segment

    def append(self, frame_type: int, payload: bytes, flags: int = 0) -> int:
        """Hand over one record. Returns its LSN at once; it is durable when `durable_lsn` has reached it.

        Raises:
            LogPoisoned, LogFenced: the writer has stopped; nothing was accepted.
            BadInput: no frame can hold it; nothing was accepted.
        """
        with self._mutex:
            if self._error is not None or self._closed:
                raise self._refusal()
            try:
                return self._pending.add(frame_type, payload, flags, self._durable)
            except BadInput:  # nothing is pending of it
                raise
            except BaseException as error:  # Ctrl-C in the middle: half a frame may be pending
                self._fail(error)
                raise

    def wait_durable(self, lsn: int | None = None) -> int:
        """Block until `lsn` (default: everything appended so far) is durable. Returns the durable LSN.

        Raises:
            LogPoisoned: a write or sync failed. LogFenced: somebody took the log over. Neither says that the record
                is lost; both say that it must not be acknowledged.
        """
        if lsn is None:
            lsn = self._pending.next_lsn - 1
        if lsn <= self._durable and self._error is None:
            return self._durable
        while True:
            try:
                with self._mutex:
                    if self._error is not None:
                        raise self._refusal()
                    if lsn <= self._durable:
                        return self._durable
                    if self._closed:
                        raise self._refusal()
                    self._check_appended(lsn)
                    pause = self._pause() if self._policy.kind == "group" else 0.0
                    if self._leading or pause > 0:
                        self._waiters += 1
                        try:
                            self._changed.wait(pause or None)
                        finally:
                            self._waiters -= 1
                        continue
                    batches, upto = self._take()
                self._lead(batches, upto)
            except BaseException as error:
                if not self._abdicate(error) or not isinstance(error, Exception):
                    raise
                raise self._refusal() from error

    async def wait_durable_async(self, lsn: int | None = None) -> int:
        """The awaitable twin of `wait_durable`. The sync runs on the background thread, never on the event loop."""
        loop = asyncio.get_running_loop()
        with self._mutex:
            if lsn is None:
                lsn = self._pending.next_lsn - 1
            if self._error is not None:
                raise self._refusal()
            if lsn <= self._durable:
                return self._durable
            if self._closed:
                raise self._refusal()
            self._check_appended(lsn)
            future = self._awaiters.add(lsn, loop)
        self.sync_soon()
        return await future

    def sync_soon(self) -> None:
        """Have what is pending synced in the background. Returns at once; poll `durable_lsn`."""
        if self._flusher is None:
            with self._mutex:
                if self._flusher is None:
                    self._flusher = threading.Thread(target=self._flush, name="rollout-wal-flusher", daemon=True)
                    self._flusher.start()
        self._flush_wanted.set()

    def rotate(self) -> int:
        """The next append starts a new segment. Returns that segment's sequence."""
        with self._mutex:
            if self._error is not None or self._closed:
                raise self._refusal()
            return self._pending.rotate()

    def publish(self) -> None:
        """Say where this owner starts: everything before is durable. Once, before anything is appended."""
        self._mark.write(self._durable, self._active.sequence)

    @contextlib.contextmanager
    def poisoning(self) -> Iterator[None]:
        """An error of the storage in here is an error of this log: nothing is accepted after it."""
        try:
            yield
        except (OSError, LogFenced) as error:
            with self._mutex:
                self._fail(error)
            raise self._refusal() from error

    def close(self) -> None:
        """Sync what is pending and let go. A poisoned or fenced writer is closed without touching the disk."""
        try:
            while not self._end():
                self.wait_durable()
        finally:
            self.abandon()

    def _end(self) -> bool:
        """Accept nothing more, if nothing is pending."""
        with self._mutex:
            if self._error is None and not self._closed and self._pending.next_lsn - 1 > self._durable:
                return False
            self._closed = True
            return True

    def abandon(self) -> None:
        """Let go of files and threads. What is pending is not written."""
        with self._mutex:
            self._closed = True
            self._waiters += 1
            while self._leading:  # its files are in use
                self._changed.wait()
            # Whoever waits for what is not written now would wait for ever.
            self._awaiters.fail(self._refusal)
            self._changed.notify_all()
        self._flush_wanted.set()
        if self._flusher is not None and self._flusher is not threading.current_thread():
            self._flusher.join()
        self._active.close(healthy=self._error is None)
        self._mark.close()
        _WRITERS.discard(self)

    # -- leading ------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        """Seconds that a group still waits for company. Called with the mutex held."""
        if self._pending.bytes >= self._policy.group_bytes:
            return 0.0
        return max(0.0, self._pending.oldest + self._policy.group_ms / 1e3 - time.monotonic())

    def _take(self) -> tuple[list[Batch], int]:
        """Become the leader of everything pending. Called with the mutex held."""
        self._leading = threading.get_ident()
        return self._pending.take()

    def _lead(self, batches: list[Batch], upto: int) -> None:
        sync = self._policy.kind != "none"
        active = self._active
        unsynced = False
        for batch in batches:
            if batch.segment is not None:
                if unsynced and sync and active.file is not None:
                    # The next header will state that this segment is whole: it must be, first.
                    active.file.sync()
                active.open(batch.segment, batch.size)
            if batch.parts:
                if active.file is None:
                    raise RuntimeError("frames are pending for a segment that was never planned")
                active.file.pwrite(b"".join(batch.parts), batch.offset)
                self.bytes_written += batch.size
                unsynced = True
        if sync and active.file is not None:
            began = time.perf_counter()
            active.file.sync()
            self.sync_s.add(time.perf_counter() - began)
            self.syncs += 1
        # After the sync and before the acknowledgement: a new owner may have read the log without these records.
        self._fence.check()
        self._mark.write(upto, active.sequence)
        if self._prepare_ahead and self._pending.half_full:
            active.prepare(self.segment.epoch, self.segment.sequence + 1)
        with self._mutex:
            self._durable = upto
            self._awaiters.settle(upto)
            self._leading = 0
            if self._waiters:
                self._changed.notify_all()
        if self._on_durable is not None:
            try:
                self._on_durable(upto)
            except BaseException as error:  # what follows from durability did not happen, and nobody would notice
                with self._mutex:
                    self._fail(error)
                raise

    def _abdicate(self, error: BaseException) -> bool:
        """The leader failed: poison the writer. Returns whether this thread was the leader."""
        if self._leading != threading.get_ident():
            return False
        if isinstance(error, OSError):
            # After a takeover any file may have gone: then say what is really the matter.
            try:
                self._fence.check()
            except LogFenced as fenced:
                error = fenced
            except OSError:
                pass
        with self._mutex:
            self._leading = 0
            self._fail(error)
        return True

    def _fail(self, error: BaseException) -> None:
        """Accept nothing more, and tell everybody who waits. Called with the mutex held."""
        if self._error is None:
            self._error = error
        self._awaiters.fail(self._refusal)
        self._changed.notify_all()

    def _check_appended(self, lsn: int) -> None:
        if lsn > self.last_lsn:
            raise refusals.never_appended(lsn, self.last_lsn)

    def _flush(self) -> None:
        while True:
            self._flush_wanted.wait()
            self._flush_wanted.clear()
            if self._closed or self._error is not None:
                return
            if self._pending.next_lsn - 1 > self._durable:
                try:
                    self.wait_durable()
                except Exception:
                    return  # the writer is poisoned and every waiter has been told: there is nothing left to do here

    def _refusal(self) -> Exception:
        return refusals.refusal(self._error, self._storage.label, self._durable)


_WRITERS: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def _disown_in_child() -> None:
    """A forked child shares its parent's files: two processes would write the same log under one epoch."""
    for writer in list(_WRITERS):
        writer._begin_threads()
        writer._error = refusals.forked(writer._storage.label)


os.register_at_fork(after_in_child=_disown_in_child)
