"""One log: a directory of segments with one owner."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from ..errors import BadInput, LogDamaged, LogError, problem
from .fence import Fence, PoliteLock
from .format import (
    LOWWATER_MAGIC,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    encode_frame,
    frame_bytes,
)
from .marks import Mark, lowwater_name, stale_marks
from .policy import SyncPolicy
from .reader import LogReader
from .recovery import Ending, Recovery, find_chain
from .segment import Frame, create_segment, debris_epoch, parse_segment_name, segment_name
from .storage import File, OsStorage, Storage
from .writer import LogWriter

JOB_LOG: Final = 1
ENGINE_LOG: Final = 2


class Log:
    """An open, owned, recovered log.

    `open` claims the next epoch, reads everything that counts through `on_frame`, rewrites the unacknowledged tail,
    and returns; only then may anybody act on what was read.

    `append`, `wait_durable` and the rest are those of `LogWriter`, at `log.writer` and under the same names here.
    """

    def __init__(
        self, storage: Storage, fence: Fence, writer: LogWriter, chain: list[tuple[int, int]], ending: Ending
    ) -> None:
        self.storage = storage
        self.fence = fence
        self.writer = writer
        self.ending = ending
        """How the log had ended before this owner."""
        self._chain = chain  # (epoch, sequence) of predecessors' segments that still exist
        self._lock: PoliteLock | None = None
        self.append = writer.append
        self.wait_durable = writer.wait_durable
        self.wait_durable_async = writer.wait_durable_async
        self.sync_soon = writer.sync_soon

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str] | Storage,
        *,
        kind: int,
        on_frame: Callable[[Frame], None],
        segment_bytes: int = 64 << 20,
        policy: SyncPolicy | None = None,
        take_over: bool = False,
        prepare_ahead: bool = True,
        on_durable: Callable[[int], None] | None = None,
    ) -> Log:
        """Own the log in a directory, creating it if it is not there.

        Args:
            kind: JOB_LOG or ENGINE_LOG; a log of the other kind is refused.
            take_over: fence a live owner instead of refusing with LogOwned.

        Raises:
            LogOwned: a live process on this machine has it. LogDamaged, LogTooNew: see `recovery`.
            LogError: the directory cannot be used (read-only, full, ...). Nothing that was acknowledged is lost.
        """
        lock: PoliteLock | None = None
        try:
            if isinstance(where, (str, os.PathLike)):
                directory = OsStorage(os.fspath(where))
                lock = PoliteLock(directory.path, take_over=take_over)
                storage: Storage = directory
            else:
                storage = where
            # Before anybody is fenced: a log of the other kind has an owner who is none of our business.
            _check_kind(storage, kind)
            fence = Fence.claim(storage)
            recovery = Recovery(storage)
            try:
                if recovery.chain:
                    _refuse_kind(storage, recovery.head.kind, kind)
                for frame in recovery.frames():
                    on_frame(frame)
            finally:
                recovery.close()
            log = cls._start(
                storage, fence, recovery, kind, segment_bytes, policy or SyncPolicy(), prepare_ahead, on_durable
            )
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise _cannot_open(where, error) from error
            raise
        log._lock = lock
        return log

    @classmethod
    def _start(
        cls,
        storage: Storage,
        fence: Fence,
        recovery: Recovery,
        kind: int,
        segment_bytes: int,
        policy: SyncPolicy,
        prepare_ahead: bool,
        on_durable: Callable[[int], None] | None,
    ) -> Log:
        chain, ending = recovery.chain, recovery.ending
        _sweep(storage, fence.epoch, recovery.head.epoch if chain else 0)
        file: File | None = None
        offset = 0
        if not chain:
            header = SegmentHeader(kind, os.urandom(16), fence.epoch, 0, 1)
        else:
            header = _successor(fence.epoch, recovery)
            if ending.tail:
                header, file, offset = _rewrite_tail(storage, header, ending, segment_bytes)
        writer: LogWriter | None = None
        try:
            writer = LogWriter(
                storage,
                fence,
                header,
                file=file,
                offset=offset,
                segment_bytes=segment_bytes,
                policy=policy,
                prepare_ahead=prepare_ahead,
                on_durable=on_durable,
            )
            # A later owner may have read the log without what this one has just made durable.
            fence.check()
            writer.publish()
        except BaseException:
            if writer is not None:
                writer.abandon()
            elif file is not None:
                file.close()
            raise
        keys = [(s.header.epoch, s.header.sequence) for s in chain]
        if file is not None:
            keys.append((header.epoch, header.sequence))
        return cls(storage, fence, writer, keys, ending)

    @property
    def durable_lsn(self) -> int:
        return self.writer.durable_lsn

    @property
    def epoch(self) -> int:
        return self.fence.epoch

    def segments(self) -> list[str]:
        """Names of the segments that this log is made of now, oldest first."""
        kept = dict.fromkeys(self._chain)
        for name in sorted(self.storage.list()):
            key = parse_segment_name(name)
            if key is not None and key[0] == self.fence.epoch:
                kept[key] = None
        return [segment_name(*key) for key in kept if self.storage.exists(segment_name(*key))]

    def read(self) -> Iterator[Frame]:
        """What is durable in this log now, in order. It may be called while others append."""
        return LogReader(self.storage).read(upto=self.writer.durable_lsn)

    def retained_bytes(self) -> int:
        """What the segments take on disk; zeros that were preallocated count."""
        total = 0
        for name in self.segments():
            file = self.storage.open(name)
            try:
                total += file.size()
            finally:
                file.close()
        return total

    def drop_before(self, sequence: int) -> int:
        """Unlink the segments before `sequence`, oldest first. Returns how many.

        Everything that is still needed must be durable at or after that segment: the caller has waited for its
        checkpoint. The low-water mark is durable before the first unlink, so that a crash in between is not mistaken
        for a missing segment.
        """
        names = [key for name in self.storage.list() if (key := parse_segment_name(name)) is not None]
        doomed = sorted((key for key in names if key[1] < sequence), key=lambda key: key[1])
        if not doomed:
            return 0
        if not any(key[0] == self.fence.epoch and key[1] >= sequence for key in names):
            raise BadInput(
                problem(
                    f"segment {sequence} of {self.storage.label} is not there yet",
                    consequence="Dropping what precedes it would drop the whole log, so nothing was dropped",
                    remedy="Append the checkpoint after `rotate`, wait until it is durable, and then drop",
                )
            )
        with self.writer.poisoning():
            self.fence.check()
            mark = Mark(self.storage, lowwater_name(self.fence.epoch), LOWWATER_MAGIC, self.writer.segment.log_id)
            try:
                mark.write(sequence, 0)
                mark.sync()
            finally:
                mark.close()
            self.storage.sync_dir()
            for key in doomed:
                _unlink(self.storage, segment_name(*key))
            for name in stale_marks(self.storage, durable_before=0, lowwater_before=self.fence.epoch):
                _unlink(self.storage, name)
            self.storage.sync_dir()
        self._chain = [key for key in self._chain if key[1] >= sequence]
        return len(doomed)

    def close(self) -> None:
        try:
            self.writer.close()
        finally:
            if self._lock is not None:
                self._lock.release()


def _check_kind(storage: Storage, kind: int) -> None:
    chain = find_chain(storage)
    for segment in chain:
        segment.file.close()
    if chain:
        _refuse_kind(storage, chain[-1].header.kind, kind)


def _refuse_kind(storage: Storage, found: int, wanted: int) -> None:
    if found != wanted:
        raise LogDamaged(
            problem(
                f"{storage.label} holds a log of kind {found}, not {wanted}",
                consequence="It was not opened and nothing was changed",
                remedy="Give the job log and each engine log a directory of its own",
            )
        )


def _successor(epoch: int, recovery: Recovery) -> SegmentHeader:
    """What the next segment's header states of its predecessor; its own sequence is one higher."""
    head, ending = recovery.head, recovery.ending
    if ending.proven:
        behind = (head.epoch, head.sequence, ending.cut)
    else:
        # The head's name may never have reached the disk. All that is in it is in the tail, and goes behind the
        # segment before it.
        behind = (head.predecessor_epoch, head.predecessor_sequence, head.predecessor_bytes)
    return SegmentHeader(head.kind, head.log_id, epoch, head.sequence, ending.next_lsn, *behind)


def _rewrite_tail(
    storage: Storage, header: SegmentHeader, ending: Ending, segment_bytes: int
) -> tuple[SegmentHeader, File, int]:
    """Put the unacknowledged tail into a new segment, durably, before the segment has its name.

    It could be that the tail was acknowledged after all (a power failure may lose the published mark), so at no
    instant may the chain lead to a segment without it.
    """
    header = replace(header, sequence=header.sequence + 1, first_lsn=ending.tail[0][0])
    parts: list[bytes] = []
    size = SEGMENT_HEADER_BYTES
    for lsn, frame_type, flags, payload in ending.tail:
        parts += encode_frame(
            frame_type,
            flags,
            payload,
            generation=header.sequence & 0xFFFFFFFF,
            lsn=lsn,
            durable_lsn=ending.claim,
            epoch=header.epoch,
        )
        size += frame_bytes(len(payload))
    file = create_segment(storage, header, max(segment_bytes, size), first_frames=parts)
    # The writer starts behind the tail, which is durable now.
    return replace(header, first_lsn=ending.next_lsn), file, size


def _sweep(storage: Storage, epoch: int, head_epoch: int) -> None:
    """Remove what crashes left behind and nothing refers to. Not worth a directory sync: it may come back.

    Only what earlier epochs left: a later owner may be at work already, and this one not know it yet.
    """
    for name in storage.list():
        if (maker := debris_epoch(name)) is not None and maker < epoch:
            _unlink(storage, name)
    # What an earlier epoch claimed is in the header of its successor's segment, which is durable.
    for name in stale_marks(storage, durable_before=head_epoch, lowwater_before=0):
        _unlink(storage, name)


def _unlink(storage: Storage, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # another owner was faster
        storage.unlink(name)


def _cannot_open(where: object, error: OSError) -> LogError:
    return LogError(
        problem(
            f"the log {getattr(where, 'label', where)} cannot be opened: {error}",
            consequence="What was acknowledged in it is untouched",
            remedy="Make the directory writable, with room for a segment, on a healthy disk; then open it again",
        )
    )
