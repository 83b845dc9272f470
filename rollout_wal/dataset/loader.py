"""A rank's end of the loader: iterate over the steps of a plan, each mapped from the node's shared memory.

    with Loader("data", "plan.arrow", name="job-17", local_rank=0, local_ranks=8) as loader:
        for batch in loader:
            for sample in batch.samples:
                sample.tokens.array("token_ids")

Arrays are views of shared pages. A step is let go when the last array of it is collected, be it numpy's or torch's:
nothing that is still in use is ever overwritten. Writing into an array changes this rank's own copy of the page.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa

from .errors import LoaderError, problem
from .lease import Lease
from .minibatch import LoadedSample, MiniBatch
from .payload_files import LONG_COPIES
from .reader_config import ReaderConfig
from .schema import TOKENS
from .wire import PROTOCOL, connect, receive, send

__all__ = ["LoadedSample", "Loader", "MiniBatch"]

_RETRY_S = 0.02


class Loader:
    """Iterates over the steps of a plan from `start_step` on, as `MiniBatch`es. One thread at a time.

    Args:
        dataset, plan: the dataset folder, and a plan that `Plan.write` wrote.
        name: of the node's reader: the same for all ranks of a job on a node, and no other job's.
        local_rank, local_ranks: of this process, and on this node.
        data_rank: whose samples of the plan this rank trains on. Ranks that share it (tensor parallel, say) map the
            same samples.
        data_ranks: the data ranks of this node; None: local rank = data rank.
        groups: column groups to load.
        need_all: a sample without one of the groups is an error; else its `group` is None.
        start_step: the job's step counter.
        memory_bytes_max: shared memory of the node, at most. When it is full, loading waits until ranks let go.
        prefetch_max: steps that are read ahead, at most; how many are follows what the ranks need.
        reader_processes: that read and decompress, the reader itself among them; None: one for each processor that it
            may use, up to 4.
        on_reader_death: "error", or "restart": start another and go on with the next step.
        on_rank_death: "carry_on", or "stop": an error for all ranks of the node when one dies.
        timeout_s: how long to wait for a step.
        start_timeout_s: how long to wait for the reader to start, and the reader for all ranks to connect.

    Raises:
        LoaderError: the reader could not be started, died, refused this rank, or let it wait too long. Iteration
            raises it as well, also for anything that is wrong with the dataset.
    """

    def __init__(
        self,
        dataset: str | Path,
        plan: str | Path,
        *,
        name: str,
        local_rank: int = 0,
        local_ranks: int = 1,
        data_rank: int | None = None,
        data_ranks: Sequence[int] | None = None,
        groups: Sequence[str] = (TOKENS,),
        need_all: bool = True,
        start_step: int = 0,
        memory_bytes_max: int = 1 << 30,
        prefetch_max: int = 8,
        reader_processes: int | None = None,
        on_reader_death: Literal["error", "restart"] = "error",
        on_rank_death: Literal["carry_on", "stop"] = "carry_on",
        timeout_s: float = 300.0,
        start_timeout_s: float = 60.0,
    ) -> None:
        self._local_rank = local_rank
        self._data_rank = local_rank if data_rank is None else data_rank
        self._restart = on_reader_death == "restart"
        self._timeout_s = timeout_s
        self._step = start_step
        self._config = ReaderConfig(
            name=name,
            dataset=str(Path(dataset).resolve()),
            plan=str(Path(plan).resolve()),
            groups=tuple(groups),
            need_all=need_all,
            local_ranks=local_ranks,
            data_ranks=tuple(range(local_ranks)) if data_ranks is None else tuple(data_ranks),
            memory_bytes_max=memory_bytes_max,
            prefetch_max=prefetch_max,
            processes=0 if reader_processes is None else max(1, reader_processes),
            stop_on_rank_death=on_rank_death == "stop",
            start_timeout_s=start_timeout_s,
        )
        if self._data_rank not in self._config.data_ranks:
            raise LoaderError(
                problem(
                    f"data rank {self._data_rank} is not among this node's {self._config.data_ranks}",
                    consequence="Its samples would not be loaded",
                    remedy="Pass the data ranks of all local ranks as data_ranks, the same for each",
                )
            )
        self._lease: Lease | None = None
        self.reader_pid = 0
        self.steps = 0
        self._connect()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave. Arrays that are still held stay valid; the reader goes when its last rank has let go of everything."""
        if self._lease is not None:
            self._lease.leave()
            self._lease = None

    # --- connecting ---

    def _connect(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        # One rank starts the reader. The others step in, one after the other, should that one be gone.
        spawn_at = time.monotonic() + 2.0 * self._local_rank
        while True:
            sock = connect(self._config.name)
            if sock is not None and self._greet(sock, deadline):
                return
            now = time.monotonic()
            if now >= deadline:
                raise LoaderError(
                    problem(
                        f"no reader {self._config.name!r} answered within {self._config.start_timeout_s} s",
                        consequence="Nothing was loaded",
                        remedy="See what the reader printed; local rank 0 must run, for it starts the reader",
                    )
                )
            if now >= spawn_at:
                self._spawn()
                spawn_at = now + 10.0
            time.sleep(_RETRY_S)

    def _spawn(self) -> None:
        """Start a reader that is nobody's child: no rank has to wait for it, and it outlives the rank that did this."""
        command = [sys.executable, "-m", "rollout_wal.dataset.node_reader", self._config.pack().hex()]
        subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >/dev/null &', "sh", *command],
            check=True,
            start_new_session=True,
            close_fds=True,
            env={**LONG_COPIES, **os.environ},
        )

    def _greet(self, sock: socket.socket, deadline: float) -> bool:
        """Say hello; False if the reader was on its way out."""
        hello = {
            "kind": "hello",
            "protocol": PROTOCOL,
            "config": self._config.pack(),
            "local_rank": self._local_rank,
            "start_step": self._step,
        }
        sock.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            send(sock, hello)
            received = receive(sock)
        except TimeoutError:
            received = None
        except (BrokenPipeError, ConnectionResetError):
            received = _last_words(sock)
        if received is None:
            sock.close()
            return False
        message, fd = received
        if message["kind"] == "error" or fd is None:
            sock.close()
            raise LoaderError(message.get("message", "the reader sent no memory"))
        self._lease = Lease(sock, fd)
        self.reader_pid, self.steps = message["pid"], message["steps"]
        self._schemas = {name: pa.ipc.read_schema(pa.py_buffer(schema)) for name, schema in message["schemas"].items()}
        return True

    # --- iterating ---

    def __iter__(self) -> Iterator[MiniBatch]:
        while (batch := self.next()) is not None:
            yield batch
            # The caller's loop variable outlives the turn; without this, two steps would be held while the next loads.
            batch.release()

    def next(self) -> MiniBatch | None:
        """The next step; None when the plan is through."""
        while True:
            message, waited_s = self._receive()
            if message is None:
                if not self._restart:
                    raise LoaderError(
                        problem(
                            f"the reader process {self.reader_pid} of this node died before step {self._step}",
                            consequence="Steps that were taken stay valid; no more will come",
                            remedy=f"Start the loader again with start_step={self._step}, or with "
                            "on_reader_death='restart'; `dmesg` tells whether memory ran out",
                        )
                    )
                self.close()
                self._connect()
                continue
            if message["kind"] == "end":
                return None
            return self._take(message, waited_s)

    def _receive(self) -> tuple[dict[str, Any] | None, float]:
        """The next message, and how long it had to be waited for; None if the reader has died."""
        if self._lease is None:
            raise LoaderError(
                problem("the loader is closed", consequence="No step was loaded", remedy="Open another Loader")
            )
        self._lease.sock.settimeout(self._timeout_s)
        began = time.monotonic()
        try:
            received = receive(self._lease.sock)
        except TimeoutError as error:
            raise LoaderError(
                problem(
                    f"no step {self._step} within {self._timeout_s} s",
                    consequence="This rank cannot go on; the others are not affected",
                    remedy=f"This rank still holds the steps {sorted(self._lease.held)[:8]}: keep no arrays of steps "
                    "that are done, or raise memory_bytes_max. Else see whether all local ranks run, and the disk",
                )
            ) from error
        if received is None:
            return None, 0.0
        message, _ = received
        if message["kind"] == "error":
            self.close()
            raise LoaderError(message["message"])
        return message, time.monotonic() - began

    def _take(self, message: dict[str, Any], waited_s: float) -> MiniBatch:
        assert self._lease is not None
        step = message["step"]
        memory_B = self._lease.map(step, message["offset"], message["bytes"])
        with suppress(OSError):  # the reader is gone, which the next `receive` reports; this step is whole
            send(self._lease.sock, {"kind": "take", "step": step, "waited_s": waited_s})
        self._step = step + 1
        return MiniBatch(step, memory_B, message["directory_offset"], self._data_rank, self._schemas)


def _last_words(sock: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """What a reader said before it closed the connection."""
    with suppress(OSError):
        return receive(sock)
    return None
