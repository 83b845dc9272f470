"""Helpers of a node's reader: forked processes that fill parts of a step, so that several processors decompress.

Threads would not do: a step has hundreds of frames of some microseconds each, and threads of Python that meet so often
mostly wait for each other. A helper shares the reader's memory, owns nothing, and leaves when the reader does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import msgpack
import numpy as np
from numpy.typing import NDArray

from .blocks import BlockReader, Blocks
from .errors import DatasetDamaged, DatasetError, LoaderError, problem

#: A helper is asked when there is this much to do: a millisecond or more, where asking it takes a tenth of one.
_PART_COST_MIN = 8 << 20


class Helpers:
    """Fills extents of the reader's memory, together with `count` forked processes.

    Fork before there are threads.

    Args:
        count: of helpers; 0: the caller does it all.
        folder: the dataset.
        memory_B: shared with the processes that are forked: extents are parts of it.
    """

    def __init__(self, count: int, folder: Path, memory_B: NDArray[np.uint8]) -> None:
        self._memory = memoryview(memory_B)  # type: ignore[arg-type]
        self._reader = BlockReader(folder)
        self._helpers: list[Connection] = []
        self.pids: list[int] = []
        for _ in range(count):
            self._fork(folder)

    def _fork(self, folder: Path) -> None:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                # What is inherited would outlive the reader in here: its sockets, its name, the other helpers' pipes.
                os.closerange(3, theirs.fileno())
                os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _help(theirs, folder, self._memory)
            finally:
                os._exit(0)
        theirs.close()
        self._helpers.append(ours)
        self.pids.append(pid)

    def close(self) -> None:
        """Send the helpers away, and wait for them."""
        for helper in self._helpers:
            helper.close()
        for pid in self.pids:
            os.waitpid(pid, 0)
        self._helpers, self.pids = [], []

    def fill(self, groups: Sequence[Blocks], offset: int, size: int) -> None:
        """Put the blocks of all groups into the extent.

        Raises:
            DatasetDamaged: a file is missing, cut short, or holds no record batch where one should be.
            LoaderError: a helper died.
        """
        cost = sum(int(blocks.cost_N.sum()) for blocks in groups) if self._helpers else 0
        parts = min(len(self._helpers) + 1, max(1, cost // _PART_COST_MIN))
        split = [blocks.split(parts) for blocks in groups] if parts > 1 else [[blocks] for blocks in groups]
        asked = self._helpers[: parts - 1]
        problems: list[DatasetError] = []
        try:
            for number, helper in enumerate(asked, 1):
                work = [blocks[number].pack() for blocks in split]
                helper.send_bytes(msgpack.packb({"offset": offset, "size": size, "groups": work}))
            for blocks in split:
                self._reader.read(blocks[0], self._memory[offset : offset + size])
        except DatasetError as error:
            problems.append(error)
        except OSError as error:
            raise _died() from error
        for helper in asked:  # all of them: nobody may write into an extent that is no longer this step's
            try:
                what = msgpack.unpackb(helper.recv_bytes())
            except (EOFError, OSError) as error:
                raise _died() from error
            if what:
                problems.append(DatasetDamaged(what))
        if problems:
            raise problems[0]


def _died() -> LoaderError:
    return LoaderError(
        problem(
            "a helper process of this node's reader died",
            consequence="The step was not loaded, and the reader stopped",
            remedy="`dmesg` tells whether memory ran out; load with on_reader_death='restart' to go on, or with "
            "reader_processes=1 to do without helpers",
        )
    )


def _help(connection: Connection, folder: Path, memory: memoryview) -> None:
    """Do what is asked until the reader is gone."""
    reader = BlockReader(folder)
    while True:
        try:
            work = msgpack.unpackb(connection.recv_bytes())
        except (EOFError, OSError):
            return
        extent = memory[work["offset"] : work["offset"] + work["size"]]
        what = ""
        try:
            for raw in work["groups"]:
                reader.read(Blocks.unpack(raw), extent)
        except DatasetError as error:
            what = str(error)
        connection.send_bytes(msgpack.packb(what))
