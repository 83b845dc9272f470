"""The store: saves the KV of rollouts in blocks, and finds the longest saved beginning of a token sequence.

    store.save("rollout-7", arrays, chain, runs)     # prepare: written, not yet findable
    store.commit()                                   # complete: durable, then findable
    store.load(token_T, chain, runs)                 # whatever beginning of them is there and intact

It is derived data: any part of it may be missing, damaged or stale, and that costs a prefill, nothing else. One thread
saves; loads may run beside it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import msgpack
import numpy as np
from numpy.typing import NDArray

from ..errors import KvError, problem
from .choose import CodecChoice, choose_codec
from .codec import Codec
from .collect import Collected, collect
from .data_files import Place, data_files
from .finder import Piece, find
from .format import Kind
from .hashing import Chain, Run
from .index import Index, Manifest
from .layout import KvArrays, empty_arrays
from .loader import Loader
from .metrics import KvMetrics, Loaded, Saved
from .reader import DataReader
from .saver import Saver, cut_manifest
from .writer import DataWriter

log = logging.getLogger(__name__)

#: Threads that read and write. They hardly use a core: the bytes go past the page cache.
_IO_THREADS = 2


class KvStore:
    """See the module.

    Args:
        path: directory of the data files; local or shared.
        index: directory of the index, on a disk of this machine; inside `path` if not given, which must then be local.
        codec: how new blocks are stored; "auto" measures this disk once per store, and remembers.
        file_bytes: size at which a data file is closed and the next begun.
        budget_bytes: the most that the data files should take; the least recently used snapshots go first.
        threads: for compression.

    Raises:
        KvError: the directory or the index cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        codec: Codec | str = "auto",
        file_bytes: int = 1 << 30,
        budget_bytes: int | None = None,
        threads: int = 2,
    ) -> None:
        self.path = Path(path)
        self.budget_bytes = budget_bytes
        self.metrics = KvMetrics()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._index = Index.open(Path(index) if index is not None else self.path / "index")
        except (OSError, lmdb.Error) as error:
            raise KvError(
                problem(
                    f"the KV snapshot store {self.path} cannot be opened: {error}",
                    consequence="KV is neither saved nor loaded; rollouts are resumed by prefill",
                    remedy="Delete the directory: it holds derived data only. Its index must lie on a local disk",
                )
            ) from error
        self._io = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="kv-io")
        self._cpu = ThreadPoolExecutor(threads, thread_name_prefix="kv")
        self._writer = DataWriter(self.path, file_bytes, self._io)
        self._reader = DataReader(self.path)
        self._loader = Loader(self._reader, self._io)
        self._used: dict[str, int] = {}
        self.refresh()
        self.choice: CodecChoice | None = None
        if codec == "auto":
            self.choice = choose_codec(self.path)
            self.codec = self.choice.codec
        else:
            self.codec = Codec[codec.upper()] if isinstance(codec, str) else codec
        self._saver = Saver(self._index, self._writer, self.metrics, self.codec, self._cpu)

    def close(self) -> None:
        """What was prepared and not committed is lost."""
        self._note_used()
        self._writer.abandon()
        self._io.shutdown()
        self._cpu.shutdown()
        self._reader.close()
        self._index.close()

    def __enter__(self) -> KvStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- saving -------------------------------------------------------------------------------------------------

    def save(
        self, name: str, arrays: KvArrays, chain: Chain, runs: Sequence[Run], *, until: float | None = None
    ) -> int:
        """Prepare a snapshot: write the blocks that are not there yet. Returns how many tokens it covers.

        Args:
            name: whose it is; replaces its earlier one when committed.
            runs: under which weights each token's KV was computed.
            until: a `time.monotonic()` after which no further block is begun. What has been written by then is a valid
                beginning; a layout with whole states is saved wholly or not at all.

        Raises:
            KvError: the disk refused, or the arrays do not fit the layout. What was prepared since the last commit is
                lost; what was committed is not affected.
        """
        arrays.check(chain.layout)
        try:
            return self._saver.prepare(name, arrays, chain, runs, until)
        except (OSError, lmdb.Error) as error:
            self._saver.give_up()
            raise self._refused(error) from error

    def commit(self) -> list[Saved]:
        """Make what was prepared durable, and only then findable.

        Raises:
            KvError: the disk refused; nothing of it can be found.
        """
        try:
            kept = self._saver.complete()
        except (OSError, lmdb.Error) as error:
            self._saver.give_up()
            raise self._refused(error) from error
        self.metrics.snapshots += len(kept)
        self.metrics.tokens_saved += sum(m.tokens for m in kept)
        if self.budget_bytes is not None and self.bytes_used() > self.budget_bytes:
            self.gc(lambda _: True)
        return [Saved(m.name, m.tokens, m.keys[-1].hex()) for m in kept]

    def _refused(self, error: Exception) -> KvError:
        return KvError(
            problem(
                f"KV could not be saved in {self.path}: {error}",
                consequence="The rollouts concerned are resumed by prefill",
                remedy="See to the space and health of that disk, or set a smaller budget",
            )
        )

    # -- loading ------------------------------------------------------------------------------------------------

    def load(
        self,
        token_T: NDArray[np.int32],
        chain: Chain,
        runs: Sequence[Run],
        *,
        name: str | None = None,
        into: KvArrays | None = None,
    ) -> Loaded:
        """The KV of the longest beginning of these tokens that is there, intact, and computed as `runs` says.

        Never fails for anything that the store holds or lacks: what cannot be used is lost, logged and counted.

        Args:
            name: whose snapshot counts as used now.
            into: arrays of this layout with room for as many tokens or more, pinned memory for example. What is loaded
                are views of their beginnings; bytes behind it may have been written too.

        Raises:
            KvError: `into` has another layout, or too little room.
        """
        try:
            pieces = find(self._index, token_T, chain, runs)
        except (lmdb.Error, msgpack.UnpackException, ValueError) as error:
            return self._fall_back(0, None, "index", str(error))
        if not pieces:
            return self._fall_back(0, None, "missing", f"no block of {len(token_T)} tokens is there")
        if name is not None:
            self._used[name] = time.time_ns()
        arrays = empty_arrays(chain.layout, np.array(token_T[: pieces[-1].stop], np.int32), into)
        good, damage = self._loader.load(pieces, arrays, chain.layout)
        if damage is not None and damage.lost:
            self._lose(damage.piece)
        if damage is not None and chain.layout.state_parts:
            good = 0  # a state is of no use without all that precedes it, nor the other way round
        if good < len(arrays):
            arrays = KvArrays(arrays.token_T[:good], tuple(a[:, :good] for a in arrays.parts), arrays.states)
        self.metrics.tokens_loaded += good
        self.metrics.bytes_loaded += good * chain.layout.token_bytes + (chain.layout.state_bytes if good else 0)
        if damage is not None:
            return self._fall_back(good, arrays, damage.reason, damage.detail)
        return Loaded(arrays, good, "" if good == len(token_T) else "partial")

    def _lose(self, piece: Piece) -> None:
        try:
            self._index.lose(piece.key, piece.place)
        except lmdb.Error as error:
            log.warning("a damaged KV block could not be taken out of the index: %s", error)

    def _fall_back(self, tokens: int, arrays: KvArrays | None, reason: str, detail: str) -> Loaded:
        self.metrics.fallbacks[reason] += 1
        return Loaded(arrays if tokens else None, tokens, reason, detail)

    # -- upkeep -------------------------------------------------------------------------------------------------

    def manifest(self, name: str) -> Manifest | None:
        """The last committed snapshot of that name; None too where the index cannot tell."""
        try:
            return self._index.manifest(name)
        except (lmdb.Error, msgpack.UnpackException, ValueError, TypeError):
            return None

    def bytes_used(self) -> int:
        """What the indexed records take on disk."""
        return sum(used for _, used in self._index.files().values())

    def refresh(self) -> None:
        """Index what other machines have written, or everything if the index was lost. Each record is verified."""
        try:
            known = self._index.files()
            behind = [
                (file_id, known.get(file_id, (0, 0))[0])
                for file_id, path in data_files(self.path)
                if path.stat().st_size > known.get(file_id, (0, 0))[0]
            ]
            # All blocks before any snapshot: what refers to a block of a file not read yet would be cut short.
            blocks: dict[bytes, Place] = {}
            manifests: list[Manifest] = []
            ends = dict(behind)
            for file_id, start in behind:
                for header, place in self._reader.scan(file_id, start):
                    ends[file_id] = place.offset + place.length
                    if header.kind == Kind.MANIFEST:
                        _, payload = self._reader.read(place, header.key, Kind.MANIFEST)
                        manifests.append(replace(Manifest.decode(payload.tobytes()), place=place))
                    else:
                        blocks[header.key] = place
            if behind:
                self._index.complete(blocks, manifests, cut=cut_manifest, scanned=ends)
        except FileNotFoundError:
            pass  # collected meanwhile
        except (OSError, lmdb.Error, KvError, msgpack.UnpackException, ValueError, TypeError) as error:
            log.warning("the KV snapshot store %s could not be read through: %s", self.path, error)

    def gc(self, alive: Callable[[Manifest], bool]) -> Collected:
        """Drop the snapshots of rollouts that are over, and those least recently used beyond the byte budget; give
        back the space of what nobody refers to.

        Args:
            alive: whether a snapshot may still be needed (its `name`, its `versions`).

        Raises:
            KvError: the disk refused. What is there stays usable.
        """
        try:
            self._note_used()
            return collect(
                self._index,
                self._reader,
                self._writer,
                self.path,
                alive,
                self.budget_bytes,
                preparing=self._saver.preparing,
            )
        except (OSError, lmdb.Error) as error:
            self._saver.give_up()
            raise self._refused(error) from error

    def _note_used(self) -> None:
        used, self._used = self._used, {}
        if used:
            try:
                self._index.touch(used)
            except lmdb.Error as error:
                log.warning("it could not be noted which KV snapshots were used: %s", error)
