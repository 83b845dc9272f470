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
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from crc32c import crc32c

from ..errors import LogFenced
from . import refusals
from .active import ActiveSegment
from .awaiters import Awaiters
from .fence import Fence
from .format import (
    ALIGNMENT,
    CRC,
    DURABLE_MAGIC,
    FORMAT_VERSION,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_PREFIX,
    MAX_PAYLOAD_BYTES,
    PADDING,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
)
from .marks import Mark, durable_name
from .policy import SyncPolicy
from .storage import File, Storage


@dataclass(slots=True)
class _Batch:
    """Pending frames that go into one segment, one behind the other."""

    offset: int
    parts: list[bytes]
    segment: SegmentHeader | None = None
    """Set: this segment is to be created first."""
    size: int = 0


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
        self._segment = header
        last = header.predecessor_sequence if file is None else header.sequence
        self._active = ActiveSegment(storage, file, last, segment_bytes)
        self._segment_bytes = segment_bytes
        self._capacity = segment_bytes if file is not None else 0
        self._policy = policy or SyncPolicy()
        self._on_durable = on_durable
        self._mark = Mark(storage, durable_name(header.epoch), DURABLE_MAGIC, header.log_id)

        self._next_lsn = header.first_lsn
        self._durable = header.first_lsn - 1
        self._offset = offset
        self._batch = _Batch(offset, [])
        self._batches = [self._batch]
        self._generation = header.sequence & 0xFFFFFFFF
        self._pending_bytes = 0
        self._oldest_pending = 0.0
        self._error: BaseException | None = None
        self._closed = False
        self._prepare_ahead = prepare_ahead
        self.bytes_written = 0
        self.syncs = 0
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
        return self._next_lsn - 1

    @property
    def pending_bytes(self) -> int:
        return self._pending_bytes

    @property
    def poisoned(self) -> BaseException | None:
        """The first error, after which nothing is accepted."""
        return self._error

    @property
    def segment(self) -> SegmentHeader:
        """The segment that the last append went to."""
        return self._segment

    def append(self, frame_type: int, payload: bytes, flags: int = 0) -> int:
        """Hand over one record. Returns its LSN at once; it is durable when `durable_lsn` has reached it.

        Raises:
            LogPoisoned, LogFenced: the writer has stopped; nothing was accepted.
        """
        length = len(payload)
        if length > MAX_PAYLOAD_BYTES:
            raise refusals.too_long(length)
        if rest := length % ALIGNMENT:
            payload += PADDING[ALIGNMENT - rest]
        size = FRAME_HEADER_BYTES + len(payload)
        with self._mutex:
            if self._error is not None or self._closed:
                raise self._refusal()
            try:
                if self._offset + size > self._capacity:
                    self._plan_rotation(size)
                lsn = self._next_lsn
                prefix = FRAME_PREFIX.pack(
                    FRAME_MAGIC,
                    FORMAT_VERSION,
                    frame_type,
                    flags,
                    length,
                    self._generation,
                    lsn,
                    self._durable,
                    self._segment.epoch & 0xFFFFFFFF,
                )
                head = prefix + CRC.pack(crc32c(payload, crc32c(prefix)))
                batch = self._batch
                batch.parts.append(head)
                batch.parts.append(payload)
                batch.size += size
                self._offset += size
                if not self._pending_bytes:
                    self._oldest_pending = time.monotonic()
                self._pending_bytes += size
                self._next_lsn = lsn + 1
            except struct.error as error:  # before anything was pending
                raise refusals.unfit(frame_type, flags) from error
            except BaseException as error:  # Ctrl-C in the middle: half a frame may be pending
                self._fail(error)
                raise
        return lsn

    def wait_durable(self, lsn: int | None = None) -> int:
        """Block until `lsn` (default: everything appended so far) is durable. Returns the durable LSN.

        Raises:
            LogPoisoned: a write or sync failed. LogFenced: somebody took the log over. Neither says that the record
                is lost; both say that it must not be acknowledged.
        """
        if lsn is None:
            lsn = self._next_lsn - 1
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
                lsn = self._next_lsn - 1
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
            self._capacity = 0
            return self._segment.sequence + 1

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
            if self._error is None and not self._closed and self._next_lsn - 1 > self._durable:
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
        self._flush_wanted.set()
        if self._flusher is not None and self._flusher is not threading.current_thread():
            self._flusher.join()
        self._active.close(healthy=self._error is None)
        self._mark.close()
        _WRITERS.discard(self)

    # -- leading ------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        """Seconds that a group still waits for company. Called with the mutex held."""
        if self._pending_bytes >= self._policy.group_bytes:
            return 0.0
        return max(0.0, self._oldest_pending + self._policy.group_ms / 1e3 - time.monotonic())

    def _take(self) -> tuple[list[_Batch], int]:
        """Become the leader of everything pending. Called with the mutex held."""
        self._leading = threading.get_ident()
        batches = self._batches
        self._batch = _Batch(self._offset, [])
        self._batches = [self._batch]
        self._pending_bytes = 0
        return batches, self._next_lsn - 1

    def _lead(self, batches: list[_Batch], upto: int) -> None:
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
            active.file.sync()
            self.syncs += 1
        # After the sync and before the acknowledgement: a new owner may have read the log without these records.
        self._fence.check()
        self._mark.write(upto, active.sequence)
        if self._prepare_ahead and self._offset * 2 > self._capacity:
            active.prepare(self._segment.epoch, self._segment.sequence + 1)
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
        if lsn >= self._next_lsn:
            raise refusals.never_appended(lsn, self._next_lsn - 1)

    def _flush(self) -> None:
        while True:
            self._flush_wanted.wait()
            self._flush_wanted.clear()
            if self._closed or self._error is not None:
                return
            if self._next_lsn - 1 > self._durable:
                try:
                    self.wait_durable()
                except Exception:
                    return  # the writer is poisoned and every waiter has been told: there is nothing left to do here

    # -- segments -----------------------------------------------------------------------------------------------

    def _plan_rotation(self, frame_size: int) -> None:
        """From here on, appends go to a segment that the leader will create. Called with the mutex held."""
        old = self._segment
        first = self._capacity == 0 and self._offset == 0
        self._segment = SegmentHeader(
            kind=old.kind,
            log_id=old.log_id,
            epoch=self._fence.epoch,
            sequence=old.sequence + 1,
            first_lsn=self._next_lsn,
            predecessor_epoch=old.predecessor_epoch if first else old.epoch,
            predecessor_sequence=old.predecessor_sequence if first else old.sequence,
            predecessor_bytes=old.predecessor_bytes if first else self._offset,
        )
        self._generation = self._segment.sequence & 0xFFFFFFFF
        self._capacity = max(self._segment_bytes, SEGMENT_HEADER_BYTES + frame_size)
        self._offset = SEGMENT_HEADER_BYTES
        self._batch = _Batch(self._offset, [], self._segment)
        self._batches.append(self._batch)

    def _refusal(self) -> Exception:
        return refusals.refusal(self._error, self._storage.label, self._durable)


_WRITERS: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def _disown_in_child() -> None:
    """A forked child shares its parent's files: two processes would write the same log under one epoch."""
    for writer in list(_WRITERS):
        writer._begin_threads()
        writer._error = refusals.forked(writer._storage.label)


os.register_at_fork(after_in_child=_disown_in_child)
