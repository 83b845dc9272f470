"""Prepares snapshots: writes the blocks that are not there yet, and a manifest that names them all.

Nothing of it can be found before `complete`, and `complete` comes after the sync.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial

import numpy as np

from .codec import Codec, encode
from .data_files import Place
from .format import Kind
from .hashing import KEY_BYTES, Chain, Run, state_key
from .index import Index, Manifest
from .layout import KvArrays, pack_states, pack_tokens
from .metrics import KvMetrics
from .writer import DataWriter, Fill, copy_of

#: Raw bytes that are being compressed at the same time.
_IN_FLIGHT_BYTES = 64 << 20
_IN_FLIGHT_MAX = 64


class Saver:
    """See the module. For one thread.

    Args:
        codec: how blocks are stored.
        cpu: threads that compress.
    """

    def __init__(self, index: Index, writer: DataWriter, metrics: KvMetrics, codec: Codec, cpu: Executor) -> None:
        self._index = index
        self._writer = writer
        self._metrics = metrics
        self.codec = codec
        self._cpu = cpu
        self._prepared: dict[bytes, Place] = {}
        self._manifests: list[Manifest] = []

    @property
    def preparing(self) -> bool:
        """Whether there is anything that is not complete."""
        return bool(self._prepared or self._manifests)

    def prepare(self, name: str, arrays: KvArrays, chain: Chain, runs: Sequence[Run], until: float | None) -> int:
        """See `KvStore.save`. Raises OSError, lmdb.Error."""
        layout, size = chain.layout, chain.block_tokens
        keys = chain.keys(arrays.token_T, runs)
        bounds = [(i * size, (i + 1) * size) for i in range(len(keys))]
        if len(arrays) % size:
            start = len(keys) * size
            keys.append(chain.key(keys[-1] if keys else chain.root(), arrays.token_T, start, len(arrays), runs))
            bounds.append((start, len(arrays)))
        if not keys:
            return 0
        pieces = list(zip(keys, bounds)) if layout.token_bytes else []
        state = state_key(keys[-1]) if layout.state_parts else None
        there = [place is not None for place in self._index.find(key for key, _ in pieces)]
        fresh = [piece for piece, found in zip(pieces, there) if not found and piece[0] not in self._prepared]
        self._metrics.blocks_shared += len(pieces) - len(fresh)
        # A state is of no use without all that precedes it: wholly, or not at all.
        left = self._write(fresh, arrays, chain, None if state else until)
        covered = len(pieces) if left is None else next(i for i, (key, _) in enumerate(pieces) if key == left)
        if state is not None and state not in self._prepared and next(self._index.find([state])) is None:
            self._write_states(state, arrays)
        if pieces and covered == 0:
            return 0
        tokens = bounds[covered - 1][1] if pieces else len(arrays)
        manifest = Manifest(
            name,
            tokens,
            tuple(_cut_runs(runs, tokens)),
            (*(key for key, _ in pieces[:covered]), *([state] if state is not None else ())),
            time.time_ns(),
        )
        payload = manifest.encode()
        place = self._writer.append(
            Kind.MANIFEST,
            bytes(KEY_BYTES),
            len(payload),
            copy_of(payload),
            codec=Codec.RAW,
            itemsize=1,
            tokens=tokens,
            raw=len(payload),
        )
        self._manifests.append(replace(manifest, place=place))
        return tokens

    def complete(self) -> list[Manifest]:
        """Make what was prepared durable, and only then findable. Raises OSError, lmdb.Error."""
        if not self._manifests:
            return []
        self._writer.sync()
        kept = self._index.complete(self._prepared, self._manifests, cut=cut_manifest)
        self._prepared, self._manifests = {}, []
        return kept

    def give_up(self) -> None:
        """What was prepared is lost."""
        self._writer.abandon()
        self._prepared, self._manifests = {}, []

    def _write(
        self, fresh: list[tuple[bytes, tuple[int, int]]], arrays: KvArrays, chain: Chain, until: float | None
    ) -> bytes | None:
        """Append blocks in order. Returns the key of the first that there was no time for, if any."""
        layout, encoding = chain.layout, deque[Future[memoryview]]()
        width = min(_IN_FLIGHT_MAX, max(1, _IN_FLIGHT_BYTES // max(1, chain.block_tokens * layout.token_bytes)))
        begun = 0
        for n, (key, (start, stop)) in enumerate(fresh):
            if until is not None and time.monotonic() > until:
                for future in encoding:
                    future.cancel()
                return key
            raw = (stop - start) * layout.token_bytes
            if self.codec is Codec.RAW:
                self._place(
                    key, Kind.TOKENS, stop - start, raw, partial(pack_tokens, arrays, start, stop), raw, layout.itemsize
                )
                continue
            while begun < min(len(fresh), n + width):
                encoding.append(self._cpu.submit(self._encode, arrays, *fresh[begun][1], chain))
                begun += 1
            stored = encoding.popleft().result()
            self._place(key, Kind.TOKENS, stop - start, len(stored), copy_of(stored), raw, layout.itemsize)
        return None

    def _encode(self, arrays: KvArrays, start: int, stop: int, chain: Chain) -> memoryview:
        raw = np.empty((stop - start) * chain.layout.token_bytes, np.uint8)
        pack_tokens(arrays, start, stop, raw)
        return encode(raw, self.codec, chain.layout.itemsize)

    def _write_states(self, key: bytes, arrays: KvArrays) -> None:
        sizes = {a.itemsize for a in arrays.states}
        itemsize = sizes.pop() if len(sizes) == 1 else 1  # of several sizes no planes can be made
        raw = pack_states(arrays)
        stored = encode(raw, self.codec, itemsize)
        self._place(key, Kind.STATE, len(arrays), len(stored), copy_of(stored), raw.nbytes, itemsize)

    def _place(self, key: bytes, kind: Kind, tokens: int, stored: int, fill: Fill, raw: int, itemsize: int) -> None:
        place = self._writer.append(
            kind, key, stored, fill, codec=self.codec, itemsize=itemsize, tokens=tokens, raw=raw
        )
        self._prepared[key] = place
        self._metrics.blocks_written += 1
        self._metrics.bytes_raw += raw
        self._metrics.bytes_written += place.length


def cut_manifest(manifest: Manifest, gone: int) -> Manifest | None:
    """A snapshot without its blocks from the n-th on. How many tokens are left is not known here, and not needed:
    loading goes by the blocks."""
    return replace(manifest, keys=manifest.keys[:gone]) if gone else None


def _cut_runs(runs: Sequence[Run], tokens: int) -> Iterator[Run]:
    for run in runs:
        take = min(run.tokens, tokens)
        if take:
            yield replace(run, tokens=take)
        tokens -= take
