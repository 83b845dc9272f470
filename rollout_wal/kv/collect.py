"""Garbage collection of the store: what is not needed goes, and files that are mostly garbage are written anew.

Safe beside writers and readers, in this process and others, and at any point of a crash: a record that disappears
under somebody costs a prefill.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .codec import Codec
from .data_files import KvDamage, Place, data_files, data_path, sync_folder
from .format import Kind
from .hashing import KEY_BYTES
from .index import Index, Manifest
from .reader import DataReader
from .writer import DataWriter, copy_of

#: A file is written anew when less than this part of it is in use.
_SPARSE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did."""

    snapshots_dead: int
    snapshots_evicted: int
    files_removed: int
    bytes_freed: int


def collect(
    index: Index,
    reader: DataReader,
    writer: DataWriter,
    folder: Path,
    alive: Callable[[Manifest], bool],
    budget_bytes: int | None,
    *,
    preparing: bool,
) -> Collected:
    """See `KvStore.gc`. Raises OSError, lmdb.Error.

    `preparing`: the writer's file holds records that no index knows yet.
    """
    manifests = index.manifests()
    dead = [m.name for m in manifests if not alive(m)]
    index.drop(dead)
    index.drop_unreferenced()
    evicted = 0
    if budget_bytes is not None:
        gone = set(dead)
        for manifest in sorted(manifests, key=lambda m: max(m.saved_ns, m.used_ns)):
            if sum(used for _, used in index.files().values()) <= budget_bytes:
                break
            if manifest.name not in gone:
                evicted += index.drop([manifest.name])
    if not preparing:
        writer.retire(index.files())
    before = _size(folder)
    removed = 0
    used = index.files()
    for file_id, path in list(data_files(folder)):
        with contextlib.suppress(FileNotFoundError):
            size, live = path.stat().st_size, used.get(file_id, (0, 0))[1]
            if live >= _SPARSE * size and live > 0:
                continue
            if not _abandoned(path):
                continue
            if live:
                _copy_live(index, reader, writer, file_id)
            index.drop_file(file_id)
            reader.forget(file_id)
            path.unlink()
            removed += 1
    for file_id in set(used) - {file_id for file_id, _ in data_files(folder)}:
        index.drop_file(file_id)
    if removed:
        sync_folder(folder)
    return Collected(len(dead), evicted, removed, max(0, before - _size(folder)))


def _abandoned(path: Path) -> bool:
    """Whether nobody writes to a data file any more: its writer holds a lock."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: only an index that nobody shares can tell, and a mistake costs a prefill
        return True
    finally:
        os.close(fd)
    return True


def _copy_live(index: Index, reader: DataReader, writer: DataWriter, file_id: bytes) -> None:
    """Append what is in use of a file to the writer's own, and have the index point there."""
    blocks: dict[bytes, tuple[Place, Place]] = {}
    for key, place in index.blocks_in(file_id):
        for kind in (Kind.TOKENS, Kind.STATE):
            with contextlib.suppress(KvDamage):
                header, stored = reader.read_stored(place, key, kind)
                new = writer.append(
                    kind,
                    key,
                    len(stored),
                    copy_of(stored),
                    codec=header.codec,
                    itemsize=header.itemsize,
                    tokens=header.tokens,
                    raw=header.raw_bytes,
                )
                blocks[key] = place, new
                break
    manifests: dict[str, tuple[Place, Place]] = {}
    for manifest in index.manifests():
        if manifest.place.file_id == file_id:
            with contextlib.suppress(KvDamage):
                header, stored = reader.read_stored(manifest.place, bytes(KEY_BYTES), Kind.MANIFEST)
                new = writer.append(
                    Kind.MANIFEST,
                    bytes(KEY_BYTES),
                    len(stored),
                    copy_of(stored),
                    codec=Codec.RAW,
                    itemsize=1,
                    tokens=header.tokens,
                    raw=header.raw_bytes,
                )
                manifests[manifest.name] = manifest.place, new
    writer.sync()
    index.move(blocks, manifests)


def _size(folder: Path) -> int:
    total = 0
    for file_id, _ in data_files(folder):
        with contextlib.suppress(FileNotFoundError):
            total += data_path(folder, file_id).stat().st_size
    return total
