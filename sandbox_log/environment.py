"""One LMDB environment, used the one way that is safe for a log of record.

- A commit is synced before it returns: `sync`, `metasync`, never WRITEMAP, where a stray write could reach the file.
- Never used across a fork: the child would share the parent's locks and file offsets.
- Never on a network file system unless the caller insists: neither the lock nor the memory map is coherent there.
- The map grows on MapFull. LMDB allows that only while this process has no transaction open, so that readers here
  are short, counted, and wait while it happens.
- Readers that died are cleared at the start, or their snapshots would pin old pages for ever.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from .errors import LogDamaged, LogInUse, NetworkFileSystem, SandboxLogError, problem

T = TypeVar("T")

_NETWORK = frozenset(
    (
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "glusterfs", "gfs", "gfs2", "gpfs", "lustre"),
        *("ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "vboxsf", "virtiofs"),
        *("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs"),
    )
)


class Environment:
    """Opens an LMDB environment and hands out transactions.

    Args:
        path: directory of the environment.
        databases: names of the databases in it.
        readonly: open what exists and write nothing but the reader table.
        map_bytes: of address space to begin with. Not disk: the file grows with what is in it.
        allow_network: do not refuse network file systems.

    Raises:
        LogInUse: this process has it open already.
        NetworkFileSystem: see above.
        SandboxLogError: there is no log there (readonly), or LMDB refuses it.
    """

    def __init__(
        self, path: Path, databases: tuple[str, ...], *, readonly: bool, map_bytes: int, allow_network: bool
    ) -> None:
        if not allow_network:
            _refuse_network(path)
        self.path = path
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._readers = 0
        self._resizing = False
        try:
            self._env: Any = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=len(databases),
                max_readers=1024,
                subdir=True,
                readonly=readonly,
                create=not readonly,
                sync=True,
                metasync=True,
                writemap=False,
                readahead=False,
            )
            self.databases = {name: self._database(name, create=not readonly) for name in databases}
            if not readonly:
                self._env.reader_check()
        except lmdb.Error as error:
            raise _opening_failed(path, error) from error

    def _database(self, name: str, *, create: bool) -> Any:
        while True:
            try:
                return self._env.open_db(name.encode(), create=create)
            except lmdb.MapResizedError:  # another process grows the map, perhaps again at once; take its size over
                self._env.set_mapsize(0)

    @contextmanager
    def read(self) -> Iterator[Any]:
        """A read transaction: one consistent snapshot. Keep it short: the map cannot grow meanwhile.

        Raises:
            LogDamaged: LMDB found its own pages damaged.
        """
        self._check_process()
        with self._idle:
            while self._resizing:
                self._idle.wait()
            self._readers += 1
        try:
            with self._begin(write=False) as txn:
                yield txn
        except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError) as error:
            raise LogDamaged(
                problem(
                    f"LMDB finds its pages damaged in {self.path}: {error}",
                    consequence="What the log holds cannot be trusted",
                    remedy="Restore the log from a copy",
                )
            ) from error
        finally:
            with self._idle:
                self._readers -= 1
                self._idle.notify_all()

    def write(self, function: Callable[[Any], T]) -> T:
        """Run `function` in a write transaction and commit it, durably. One thread only.

        `function` runs again, in a new transaction, if the map was full: it must depend on the transaction alone.
        """
        self._check_process()
        while True:
            try:
                with self._begin(write=True) as txn:
                    return function(txn)
            except lmdb.MapFullError:
                self._resize(lambda: self._env.set_mapsize(2 * self._env.info()["map_size"]))

    def close(self) -> None:
        """Release it. Does nothing in a process that merely inherited it."""
        if os.getpid() == self._pid:
            self._env.close()

    def _begin(self, *, write: bool) -> Any:
        while True:
            try:
                return self._env.begin(write=write)
            except lmdb.MapResizedError:  # another process grew the map; take its size over
                self._resize(lambda: self._env.set_mapsize(0), own_reader=not write)

    def _resize(self, resize: Callable[[], None], *, own_reader: bool = False) -> None:
        with self._idle:
            # A reader that finds the map resized counts itself among the readers, but holds no transaction yet.
            if own_reader:
                self._readers -= 1
            while self._resizing or self._readers:
                self._idle.wait()
            self._resizing = True
            try:
                resize()
            finally:
                self._resizing = False
                if own_reader:
                    self._readers += 1
                self._idle.notify_all()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LogInUse(
                problem(
                    f"the log {self.path} was opened by process {self._pid} and is used in its fork {os.getpid()}",
                    consequence="LMDB's locks do not survive a fork; the log would be damaged",
                    remedy="Open the log in the child, after the fork (or start children with spawn)",
                )
            )


def file_system_of(path: Path, mountinfo: str) -> str:
    """The type of the file system that holds `path`, by the text of /proc/self/mountinfo; "" if it is not there."""
    target = str(path)
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        # Spaces and such in mount points are written as octal escapes.
        mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), left.split(" ")[4]).rstrip("/")
        inside = target == mount or target.startswith(mount + "/")
        if inside and len(mount) >= best:  # of two mounts on one point the later one is on top
            best, kind = len(mount), right.split(" ")[0]
    return kind


def _refuse_network(path: Path) -> None:
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return  # not Linux; nothing can be found out
    kind = file_system_of(path.resolve(), mountinfo)
    if kind in _NETWORK:
        raise NetworkFileSystem(
            problem(
                f"{path} lies on a network file system ({kind})",
                consequence="LMDB's lock and memory map are not coherent there; two machines could damage the log",
                remedy="Put the log on a local disk, or pass allow_network=True if only this machine ever opens it",
            )
        )


def _opening_failed(path: Path, error: lmdb.Error) -> SandboxLogError:
    if "already open" in str(error):
        return LogInUse(
            problem(
                f"the log {path} is already open in this process",
                consequence="LMDB's locks do not allow a second time",
                remedy="Share the SandboxLog object that is open",
            )
        )
    kind: type[SandboxLogError] = LogDamaged if isinstance(error, lmdb.InvalidError) else SandboxLogError
    return kind(
        problem(
            f"the log {path} cannot be opened: {error}",
            consequence="Nothing was read or written",
            remedy="Check the path and its permissions; a log is a directory that holds data.mdb",
        )
    )
