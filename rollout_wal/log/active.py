"""The segment file that a writer writes to, and the next one, filled with zeros before it is needed.

Only the thread that leads a commit touches the file; the next segment is filled by a thread of its own.
"""

from __future__ import annotations

import contextlib
import errno
import threading

from .format import SEGMENT_HEADER_BYTES, SegmentHeader
from .segment import create_segment, spare_name, zero_filled
from .storage import File, Storage


class ActiveSegment:
    """See the module.

    Args:
        file: the open segment to go on in, or None: the first commit creates one.
        sequence: of the segment that holds the last durable record.
    """

    def __init__(self, storage: Storage, file: File | None, sequence: int, segment_bytes: int) -> None:
        self._storage = storage
        self._segment_bytes = segment_bytes
        self.file = file
        self.sequence = sequence
        self._spare: tuple[str, File] | None = None
        self._spare_for = 0
        self._spare_error: OSError | None = None
        self._thread: threading.Thread | None = None

    def open(self, header: SegmentHeader, size: int) -> None:
        """Go on in a new segment, with room for `size` bytes of frames at least.

        Raises:
            OSError: it could not be created, or the disk failed while its space was being prepared.
        """
        if self.file is not None:
            self.file.close()
            self.file = None
        self._join()
        if self._spare_error is not None:
            raise self._spare_error
        capacity = max(self._segment_bytes, SEGMENT_HEADER_BYTES + size)
        spare, self._spare = self._spare, None
        if spare is not None and capacity > self._segment_bytes:
            spare[1].close()
            self._storage.unlink(spare[0])
            spare = None
        self.file = create_segment(self._storage, header, capacity, spare=spare)
        self.sequence = header.sequence

    def prepare(self, epoch: int, sequence: int) -> None:
        """Fill the segment `sequence` with zeros while this one is still in use, off the path of the commits. Once."""
        if self._spare_for == sequence:
            return
        self._spare_for = sequence
        name = spare_name(epoch, sequence)

        def fill() -> None:
            try:
                self._spare = (name, zero_filled(self._storage, name, self._segment_bytes))
            except OSError as error:
                # Nothing that was acknowledged is in it. Space may come back until it is needed; a disk that fails
                # has failed for good, and the rotation says so.
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    self._spare_error = error

        self._thread = threading.Thread(target=fill, name="rollout-wal-spare", daemon=True)
        self._thread.start()

    def forked(self) -> None:
        """In a child process: the thread stayed with the parent."""
        self._thread = None

    def close(self, *, healthy: bool) -> None:
        """Let go of the files. The prepared segment is removed only if the log is healthy: a new owner may have it."""
        self._join()
        if self._spare is not None:
            name, file = self._spare
            self._spare = None
            file.close()
            if healthy:
                with contextlib.suppress(OSError):
                    self._storage.unlink(name)
        if self.file is not None:
            self.file.close()
            self.file = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
