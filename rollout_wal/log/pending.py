"""What is appended and not yet written: encoded frames, in batches, one for each segment that they go to.

An LSN and a place in a segment are given here, in the order of the appends, and nothing is decided later: what the
leader writes is what was planned.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

from crc32c import crc32c

from . import refusals
from .format import (
    ALIGNMENT,
    CRC,
    FORMAT_VERSION,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_PREFIX,
    MAX_PAYLOAD_BYTES,
    PADDING,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
)


@dataclass(slots=True)
class Batch:
    """Pending frames that go into one segment, one behind the other."""

    offset: int
    parts: list[bytes]
    segment: SegmentHeader | None = None
    """Set: this segment is to be created first."""
    size: int = 0


class Pending:
    """Not thread-safe: the writer's mutex is held around every call but those that look at one number.

    Args:
        header: of the segment that the last frame went to, and what the next one shall name as its predecessor.
        epoch: of the owner; each new segment is of this epoch.
        offset: where the next frame goes in that segment.
        open: whether the segment is there and may be appended to.
    """

    def __init__(self, header: SegmentHeader, epoch: int, *, offset: int, segment_bytes: int, open: bool) -> None:
        self.segment = header
        self.next_lsn = header.first_lsn
        self.bytes = 0
        self.oldest = 0.0
        """When the oldest pending frame was appended (monotonic seconds)."""
        self._epoch = epoch
        self._segment_bytes = segment_bytes
        self._capacity = segment_bytes if open else 0
        self._offset = offset
        self._generation = header.sequence & 0xFFFFFFFF
        self._batch = Batch(offset, [])
        self._batches = [self._batch]

    @property
    def half_full(self) -> bool:
        """Whether the next segment will be needed before long."""
        return self._offset * 2 > self._capacity

    def add(self, frame_type: int, payload: bytes, flags: int, durable: int) -> int:
        """Encode one record. Returns its LSN.

        Args:
            durable: the durable LSN now. Each frame repeats it: so recovery knows, without any mark, up to where the
                log was acknowledged when this was written, and refuses damage below (I4).

        Raises:
            BadInput: the frame cannot hold it; nothing is pending of it.
        """
        length = len(payload)
        if length > MAX_PAYLOAD_BYTES:
            raise refusals.too_long(length)
        if rest := length % ALIGNMENT:
            payload += PADDING[ALIGNMENT - rest]
        size = FRAME_HEADER_BYTES + len(payload)
        if self._offset + size > self._capacity:
            self._plan_rotation(size)
        lsn = self.next_lsn
        try:
            prefix = FRAME_PREFIX.pack(
                FRAME_MAGIC,
                FORMAT_VERSION,
                frame_type,
                flags,
                length,
                self._generation,
                lsn,
                durable,
                self.segment.epoch & 0xFFFFFFFF,
            )
        except struct.error as error:
            raise refusals.unfit(frame_type, flags) from error
        head = prefix + CRC.pack(crc32c(payload, crc32c(prefix)))
        batch = self._batch
        batch.parts.append(head)
        batch.parts.append(payload)
        batch.size += size
        self._offset += size
        if not self.bytes:
            self.oldest = time.monotonic()
        self.bytes += size
        self.next_lsn = lsn + 1
        return lsn

    def take(self) -> tuple[list[Batch], int]:
        """All batches, and the LSN up to which they reach. What is appended from here on is of the next round."""
        batches = self._batches
        self._batch = Batch(self._offset, [])
        self._batches = [self._batch]
        self.bytes = 0
        return batches, self.next_lsn - 1

    def rotate(self) -> int:
        """The next frame starts a new segment. Returns that segment's sequence."""
        self._capacity = 0
        return self.segment.sequence + 1

    def _plan_rotation(self, frame_size: int) -> None:
        """From here on, frames go to a segment that the leader will create."""
        old = self.segment
        first = self._capacity == 0 and self._offset == 0
        self.segment = SegmentHeader(
            kind=old.kind,
            log_id=old.log_id,
            epoch=self._epoch,
            sequence=old.sequence + 1,
            first_lsn=self.next_lsn,
            predecessor_epoch=old.predecessor_epoch if first else old.epoch,
            predecessor_sequence=old.predecessor_sequence if first else old.sequence,
            predecessor_bytes=old.predecessor_bytes if first else self._offset,
        )
        self._generation = self.segment.sequence & 0xFFFFFFFF
        self._capacity = max(self._segment_bytes, SEGMENT_HEADER_BYTES + frame_size)
        self._offset = SEGMENT_HEADER_BYTES
        self._batch = Batch(self._offset, [], self.segment)
        self._batches.append(self._batch)
