"""The log itself: thousands of sandboxes in one LMDB environment, one fenced writer per sandbox, many readers.

<log>/data.mdb, lock.mdb    LMDB: databases `meta`, `sandboxes`, `events`
<log>/blobs/                large bytes; see `blobs`
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .appends import SandboxWriter, TakeOver
from .blobs import BlobStore, NotOpened
from .chain import DATABASES, Chains, Summary, id_key
from .directories import make_directory
from .environment import Environment
from .errors import LogDamaged, LogInUse, LogTooNew, SandboxLogError, UnknownSandbox, problem
from .events import FORMAT, BlobRef, Event, Payload, blob_refs
from .faults import Faults, no_fault
from .poison import Poison
from .writer import GroupCommitter, Job


@dataclass(slots=True)
class Report:
    """What `SandboxLog.verify` found."""

    sandboxes: int = 0
    events: int = 0
    blobs: int = 0
    orphans: int = 0
    damage: list[str] = field(default_factory=list)


class SandboxLog:
    """Open a log, create one, read it, write to it. Safe to use from many threads; never across a fork.

    Args:
        path: directory of the log.
        readonly: take no writer's part: no thread, no lock, and `writer` is refused.
        map_bytes: of address space to begin with; grows by itself.
        inline_bytes_max: outputs and arguments up to this size stand in the event, larger ones become blobs.
        allow_network: use a network file system all the same.
        faults: see `faults`; for tests.

    Raises:
        LogInUse, NetworkFileSystem, LogDamaged, LogTooNew, SandboxLogError: see there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        map_bytes: int = 1 << 30,
        inline_bytes_max: int = 16 << 10,
        allow_network: bool = False,
        faults: Faults = no_fault,
    ) -> None:
        self.path = Path(path)
        self.inline_bytes_max = inline_bytes_max
        self.faults = faults
        self._committer: GroupCommitter | None = None
        self._lock_fd = -1
        if not readonly:
            make_directory(self.path)
        elif not (self.path / "data.mdb").is_file():
            raise SandboxLogError(
                problem(
                    f"there is no sandbox log at {self.path}",
                    consequence="Nothing was read",
                    remedy="Name the directory that holds data.mdb",
                )
            )
        self._environment = Environment(
            self.path, DATABASES, readonly=readonly, map_bytes=map_bytes, allow_network=allow_network
        )
        try:
            self._chains = Chains(self._environment)
            poison = Poison()
            self.blobs = BlobStore(self.path / "blobs", create=not readonly, poison=poison)
            if not readonly:
                self._lock_fd = _lock_blobs(self.path, exclusive=False)
                self._environment.write(self._write_format)
                self._committer = GroupCommitter(self._environment, faults, poison)
            with self._environment.read() as txn:
                self._check_format(txn)
        except BaseException:
            self.close()
            raise

    # -- reading

    def sandboxes(self) -> list[Summary]:
        """Every sandbox in the log, by id."""
        return self._chains.ends()

    def summary(self, sandbox_id: str) -> Summary:
        """Where its chain ends.

        Raises:
            UnknownSandbox: it is not in this log.
        """
        found = self._chains.end(sandbox_id)
        if found is None:
            raise UnknownSandbox(
                problem(
                    f"the log {self.path} has no sandbox {sandbox_id!r}",
                    consequence="There is nothing to read",
                    remedy="`rollout-wal sandbox show LOG` lists what is there",
                )
            )
        return found

    def events(self, sandbox_id: str) -> Iterator[Event]:
        """Its events in order, as far as the chain reached when this was called, each link verified.

        Raises:
            UnknownSandbox: it is not in this log.
            LogDamaged: a link is missing or is not what was written; the message names it.
        """
        return self._chains.events(self.summary(sandbox_id))

    def load(self, payload: Payload) -> bytes:
        """The bytes that a payload stands for.

        Raises:
            LogDamaged: its blob is missing or damaged.
        """
        return self.blobs.get(payload) if isinstance(payload, BlobRef) else payload

    def store(self, data: bytes) -> Payload:
        """`data` itself if it is small, else a reference to a blob that is durable when this returns.

        Where no file can be opened for a blob, `data` itself as well: an event may be of any size, and what a command
        put out must not be lost for want of a descriptor.

        Raises:
            LogPoisoned: the blob cannot be written, and neither can anything else from now on.
        """
        if len(data) <= self.inline_bytes_max:
            return data
        try:
            return self.blobs.put(data)
        except NotOpened:
            return data

    def verify(self, sandbox_id: str | None = None) -> Report:
        """Read everything, or one sandbox, back: every link of every chain and every blob they refer to."""
        report = Report()
        seen: set[BlobRef] = set()
        for end in self.sandboxes() if sandbox_id is None else [self.summary(sandbox_id)]:
            report.sandboxes += 1
            try:
                for event in self._chains.events(end):
                    report.events += 1
                    seen.update(blob_refs(event.body))
            except LogDamaged as error:
                report.damage.append(str(error))
        for ref in seen:
            report.blobs += 1
            try:
                self.blobs.get(ref)
            except LogDamaged as error:
                report.damage.append(str(error))
        if sandbox_id is None:
            known = {ref.digest for ref in seen}
            report.orphans = sum(digest not in known for digest, _ in self.blobs.digests())
        return report

    # -- writing

    def writer(self, sandbox_id: str, header: Mapping[str, Any]) -> SandboxWriter:
        """Become the one writer of a sandbox, durably: whoever was it before is refused from now on.

        Args:
            sandbox_id: 1..400 bytes of UTF-8.
            header: body of the header event, logged if the sandbox is new and ignored otherwise.

        Raises:
            LogPoisoned: the log cannot be written.
        """
        job = TakeOver(self._chains, id_key(sandbox_id), sandbox_id, dict(header))
        summary: Summary = self._submit(job).result()
        return SandboxWriter(self._chains, self._submit, summary)

    @property
    def commits(self) -> int:
        """Durable commits that this object made."""
        return self._committer.commits if self._committer is not None else 0

    def _submit(self, job: Job) -> Future[Any]:
        if self._committer is None:
            raise LogInUse(
                problem(
                    f"the log {self.path} was opened for reading only, or is closed",
                    consequence="Nothing was written",
                    remedy="Open it without readonly",
                )
            )
        return self._committer.submit(job)

    # -- housekeeping

    @staticmethod
    def collect(path: str | os.PathLike[str]) -> tuple[int, int]:
        """Remove the blobs that no event refers to. A crash between a blob and its outcome leaves such.

        Returns:
            how many files were removed, and how many bytes of disk they held.

        Raises:
            LogInUse: somebody has the log open for writing.
            LogDamaged: a chain is broken; nothing is removed, for what it referred to is not known.
        """
        with SandboxLog(path, readonly=True) as log:
            fd = _lock_blobs(log.path, exclusive=True)
            try:
                referred = {
                    ref.digest
                    for end in log.sandboxes()
                    for event in log._chains.events(end)
                    for ref in blob_refs(event.body)
                }
                return log.blobs.collect(referred)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Commit what was handed over, and release the log."""
        if self._committer is not None:
            self._committer.close()
            self._committer = None
        self._environment.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> SandboxLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- inside a transaction

    def _write_format(self, txn: Any) -> None:
        txn.put(b"format", str(FORMAT).encode(), db=self._environment.databases["meta"], overwrite=False)

    def _check_format(self, txn: Any) -> None:
        found = int(txn.get(b"format", db=self._environment.databases["meta"], default=b"0"))
        if found != FORMAT:
            raise LogTooNew(
                problem(
                    f"the log {self.path} has format {found}, this version reads {FORMAT}",
                    consequence="Nothing was read or written",
                    remedy="Use the version of rollout-wal that wrote it, or a newer one",
                )
            )


def _lock_blobs(path: Path, *, exclusive: bool) -> int:
    """Writers share this lock for as long as they are open; the collector must be alone."""
    fd = os.open(path / "blobs" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise LogInUse(
            problem(
                f"the log {path} is open for writing" if exclusive else f"orphans of {path} are being collected",
                consequence="A blob that is about to be referred to could be taken for an orphan",
                remedy="Try again when that is over",
            )
        ) from error
    return fd
