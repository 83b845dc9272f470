"""Reads records of all data files, and believes nothing of what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from ..errors import KvError
from .codec import Codec, decode
from .data_files import KvDamage, Place, data_path, open_direct, read_at
from .format import ALIGNMENT, HEADER_BYTES, Header, Kind, record_bytes
from .memory import aligned


class DataReader:
    """Keeps files open; thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[bytes, int] = {}

    def read(self, place: Place, key: bytes, kind: Kind) -> tuple[Header, NDArray[np.uint8]]:
        """The header and the decoded payload of a record.

        Raises:
            KvDamage: "truncated", "corrupt" or "mismatch", see `reason`.
            OSError: FileNotFoundError where the file is gone.
        """
        header, stored = self.read_stored(place, key, kind)
        return header, decoded(header, stored, place)

    def read_stored(self, place: Place, key: bytes, kind: Kind) -> tuple[Header, memoryview]:
        """The header and the payload as it is in the file, checked. Raises like `read`."""
        into = aligned(self.readable(place))
        count = self.fetch(place.file_id, place.offset, into[: place.length])
        header, payload = record(into.data[:count], place, key, kind)
        check(header, payload, place)
        return header, payload

    def readable(self, place: Place) -> int:
        """Bytes of memory that reading a record takes: no more than its file has, whatever the index says."""
        size = os.fstat(self._open(place.file_id)).st_size
        if place.offset < 0 or place.offset + HEADER_BYTES > size:
            raise KvDamage("truncated", place, "the file ends before it")
        if place.offset % ALIGNMENT or place.length % ALIGNMENT or place.length <= 0:
            raise KvDamage("mismatch", place, "no record stands there")
        return min(place.length, record_bytes(size - place.offset))

    def fetch(self, file_id: bytes, offset: int, into: NDArray[np.uint8]) -> int:
        """Read what is there; returns the bytes read. Memory, length and offset are multiples of ALIGNMENT.

        Raises OSError.
        """
        return read_at(self._open(file_id), into.data, offset)

    def scan(self, file_id: bytes, start: int) -> Iterator[tuple[Header, Place]]:
        """Intact records from an offset on; damaged stretches are stepped over."""
        # Through the page cache, which reads ahead: headers are looked at one by one.
        fd = os.open(data_path(self._folder, file_id), os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            at = start
            while at < size:
                header = Header.decode(os.pread(fd, HEADER_BYTES, at))
                at += ALIGNMENT
                if header is None or (header.file_id, header.offset) != (file_id, at - ALIGNMENT):
                    continue
                stored = os.pread(fd, header.stored_bytes, header.offset + HEADER_BYTES)
                if len(stored) < header.stored_bytes or crc32c(stored) != header.payload_crc:
                    continue
                yield header, Place(file_id, header.offset, header.record_bytes)
                at = header.offset + header.record_bytes
        finally:
            os.close(fd)

    def forget(self, file_id: bytes) -> None:
        """Close a file."""
        if (fd := self._fds.pop(file_id, None)) is not None:
            os.close(fd)

    def close(self) -> None:
        for file_id in list(self._fds):
            self.forget(file_id)

    def _open(self, file_id: bytes) -> int:
        fd = self._fds.get(file_id)
        if fd is None:
            fd = open_direct(data_path(self._folder, file_id), os.O_RDONLY)
            other = self._fds.setdefault(file_id, fd)
            if other != fd:  # another thread was faster
                os.close(fd)
                fd = other
        return fd


def record(data: memoryview, place: Place, key: bytes, kind: Kind) -> tuple[Header, memoryview]:
    """The header and the payload, which is not checked yet, of what was read at a place.

    Raises:
        KvDamage: not the record that the index says is there, or not all of it.
    """
    if len(data) < HEADER_BYTES:
        raise KvDamage("truncated", place, "the file ends before it")
    header = Header.decode(data[:HEADER_BYTES])
    if header is None:
        raise KvDamage("corrupt", place, "its header is damaged")
    found = header.file_id, header.offset, header.key, header.kind, header.record_bytes
    if found != (place.file_id, place.offset, key, kind, place.length):
        raise KvDamage("mismatch", place, "another record stands there")
    payload = data[HEADER_BYTES : HEADER_BYTES + header.stored_bytes]
    if len(payload) < header.stored_bytes:
        raise KvDamage("truncated", place, "the file ends within it")
    return header, payload


def check(header: Header, payload: memoryview, place: Place) -> None:
    """Raises KvDamage: not the bytes that were written."""
    if crc32c(payload) != header.payload_crc:
        raise KvDamage("corrupt", place, "its checksum does not match")


def decoded(header: Header, stored: memoryview, place: Place) -> NDArray[np.uint8]:
    """The raw bytes of a checked payload. Raises KvDamage."""
    try:
        return decode(stored, Codec(header.codec), header.itemsize, header.raw_bytes)
    except (KvError, ValueError) as error:
        raise KvDamage("corrupt", place, f"its payload cannot be decoded: {error}") from error
