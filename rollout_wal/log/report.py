"""The numbers of a log writer, for whoever watches it: here, or told by another process."""

from __future__ import annotations

from typing import Any, Protocol

from ..histogram import SYNC_S, Histogram


class WriterNumbers(Protocol):
    """What can be read off a `LogWriter` at any time, without a lock."""

    @property
    def last_lsn(self) -> int: ...
    @property
    def durable_lsn(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    @property
    def poisoned(self) -> BaseException | None: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def syncs(self) -> int: ...
    @property
    def sync_s(self) -> Histogram: ...


class Reporter:
    """Tells of a writer in messages. Each says what was added since the one before, so that what is added up of them
    counts on when the process dies and another writer goes on."""

    def __init__(self, writer: WriterNumbers) -> None:
        self._writer = writer
        self._bytes = self._syncs = 0
        self._counts = [0] * (len(SYNC_S) + 1)
        self._seconds = 0.0

    def message(self) -> dict[str, Any]:
        """Plain types."""
        w = self._writer
        written, syncs, counts, seconds = w.bytes_written, w.syncs, list(w.sync_s.counts), w.sync_s.total
        out = {
            "last": w.last_lsn,
            "durable": w.durable_lsn,
            "pending": w.pending_bytes,
            "bytes": written - self._bytes,
            "syncs": syncs - self._syncs,
            "counts": [now - before for now, before in zip(counts, self._counts)],
            "seconds": seconds - self._seconds,
        }
        self._bytes, self._syncs, self._counts, self._seconds = written, syncs, counts, seconds
        return out


class Reported:
    """A writer in another process, by what its reporter has told: a `WriterNumbers`."""

    def __init__(self) -> None:
        self.last_lsn = self.durable_lsn = self.pending_bytes = 0
        self.bytes_written = self.syncs = 0
        self.sync_s = Histogram(SYNC_S)
        self.poisoned: BaseException | None = None

    def add(self, message: dict[str, Any]) -> None:
        """Take in a message of `Reporter`."""
        self.last_lsn, self.durable_lsn = message["last"], message["durable"]
        self.pending_bytes = message["pending"]
        self.bytes_written += message["bytes"]
        self.syncs += message["syncs"]
        for index, count in enumerate(message["counts"]):
            self.sync_s.counts[index] += count
        self.sync_s.total += message["seconds"]
