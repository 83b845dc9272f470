"""The workers of one backend: started from the nursery, listened to, buried, stopped.

A death is believed when the process is gone, and not before (I5): its log is taken over then, and a process that still
ran would be fenced in the middle of a step.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable, Sequence

from ..errors import BadInput, MissingExtra, ProvenanceError, WorkerFailed, problem
from ..kv.snapshots import KvConfig
from ..wal import RolloutWal
from .commands import Commands
from .nursery import Nursery
from .pool import WorkerHandle, WorkerState
from .spec import EngineSpec
from .wire import Message

#: Deaths in a row before a worker was ready: of those that say why, and of those that do not (killed, as a rule).
_TOLD_FAILURES = 3
_SILENT_DEATHS = 20
#: How long SIGKILL may take before something is badly wrong with the machine.
_KILL_S = 30.0


class Fleet:
    """See the module. For the coordinator's thread.

    Args:
        commands: wakes `listen`.
    """

    def __init__(
        self,
        wal: RolloutWal,
        spec: EngineSpec,
        commands: Commands,
        *,
        workers: int,
        devices: Sequence[str] | None = None,
        first_version: int,
        witness: str | None,
        grace_s: float,
        take_over: bool,
        kv: KvConfig | None,
    ) -> None:
        self.workers = [WorkerHandle(f"{i}", wal.engine_path(f"{i}")) for i in range(workers)]
        self.nursery: Nursery | None = None
        """A process: it is begun by `open`, in the thread that will see to it that it ends."""
        self._wal = wal
        self._spec = spec
        self._commands = commands
        self._devices = dict(zip((w.name for w in self.workers), devices, strict=True)) if devices is not None else {}
        self._first_version = first_version
        self._witness = witness
        self._grace_s = grace_s
        self._take_over = take_over
        self._kv = kv
        self._selector = selectors.DefaultSelector()
        self._selector.register(commands, selectors.EVENT_READ)

    # -- life ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin the nursery, and from it a process for each rank."""
        self.nursery = Nursery(self._spec.module, threads=self._spec.threads)
        for worker in self.workers:
            self.start(worker)

    def start(self, worker: WorkerHandle) -> None:
        """A new process for a rank, on the weights in force."""
        policy, sync = self._wal.state.policy, self._wal.policy
        config: Message = {
            "spec": self._spec.to_message(),
            "log": str(worker.log),
            "segment_bytes": self._wal.segment_bytes,
            "policy": {"kind": sync.kind, "group_ms": sync.group_ms, "group_bytes": sync.group_bytes},
            "weights": (
                {"version": policy.version, "digest": policy.weights_digest, "source": policy.source}
                if policy
                else None
            ),
            "first_version": self._first_version,
            "witness": self._witness,
            "take_over": self._take_over,
            "devices": self._devices.get(worker.name),
        }
        if self._kv is not None:
            config["kv"] = self._kv.to_message()
        assert self.nursery is not None
        child, sock = self.nursery.fork(config)
        worker.born(child, sock)
        if self._kv is not None:
            # Not in the configuration, which is one packet: there may be any number of them.
            alive = [r.id for r in self._wal.in_flight()]
            worker.send({"t": "begun", "last": self._wal.state.next_rollout - 1, "alive": alive})
        self._selector.register(sock, selectors.EVENT_READ, worker)

    def bury(self, worker: WorkerHandle) -> None:
        """A worker is gone, or as good as: see to it that it is, and let go of what belonged to its process.

        Raises:
            WorkerFailed: it does not die.
        """
        if worker.channel is not None:
            self._selector.unregister(worker.channel.sock)
        if not worker.dead(self._grace_s if worker.state is WorkerState.STOPPING else 1.0):
            worker.signal(signal.SIGKILL)
            if not worker.dead(_KILL_S):
                raise WorkerFailed(
                    problem(
                        f"worker {worker.name} does not die of SIGKILL",
                        consequence="Its log cannot be taken over while it may still write",
                        remedy="The machine hangs in I/O, as a rule; restart it. Everything acknowledged is in the log",
                    )
                )
        worker.bury()

    def failed_to_start(self, worker: WorkerHandle) -> None:
        """It died before it was ready.

        Raises:
            WorkerFailed, or what the worker said: another try would end the same way.
        """
        worker.failures += 1
        if isinstance(worker.failure, (BadInput, ProvenanceError, MissingExtra)):
            raise worker.failure  # it would say the same again
        if worker.failures >= (_TOLD_FAILURES if worker.failure is not None else _SILENT_DEATHS):
            raise WorkerFailed(
                problem(
                    f"worker {worker.name} died {worker.failures} times before it was ready"
                    + (f": {worker.failure}" if worker.failure is not None else ""),
                    consequence="No more is generated; everything acknowledged is in the log",
                    remedy="See the workers' messages on standard error, cure the cause, and start again",
                )
            )

    def stop(self, hear: Callable[[WorkerHandle], None]) -> None:
        """Preempt all in good order; whoever does not stop within the grace time is killed.

        Args:
            hear: takes in what a worker says.
        """
        deadline = time.monotonic() + self._grace_s
        for worker in self.workers:
            if worker.state is not WorkerState.DEAD:
                worker.state = WorkerState.STOPPING
                worker.signal(signal.SIGTERM)
                worker.send({"t": "stop"})
        for worker in self.workers:
            while worker.channel is not None and not worker.dead(0.02) and time.monotonic() < deadline:
                hear(worker)
            worker.signal(signal.SIGKILL)
            worker.dead(5.0)
            if worker.channel is not None:
                hear(worker)

    def kill(self) -> None:
        """SIGKILL to all."""
        for worker in self.workers:
            worker.signal(signal.SIGKILL)

    def close(self) -> None:
        """They were stopped or killed: let go of everything."""
        for worker in self.workers:
            worker.dead(5.0)
            worker.bury()
        if self.nursery is not None:
            self.nursery.close()
        self._selector.close()

    # -- each round ---------------------------------------------------------------------------------------------

    def listen(self, timeout_s: float) -> list[WorkerHandle]:
        """Those that have said something. Returns early, with none, when a command comes."""
        heard: list[WorkerHandle] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._commands.awake()
            else:
                heard.append(key.data)
        return heard

    def gone(self) -> list[WorkerHandle]:
        """Send what could not be sent before; return those whose process is gone, or as good as."""
        gone: list[WorkerHandle] = []
        for worker in self.workers:
            if worker.channel is not None and worker.channel.wants_write:
                worker.channel.flush()
            if (
                worker.state is WorkerState.STOPPING
                and worker.stopped_at
                and (time.monotonic() - worker.stopped_at > self._grace_s)
            ):
                worker.signal(signal.SIGKILL)
            if worker.state is not WorkerState.DEAD and (
                worker.dead() or (worker.channel is not None and worker.channel.closed)
            ):
                gone.append(worker)
        return gone

    # -- control ------------------------------------------------------------------------------------------------

    def ready(self) -> list[WorkerHandle]:
        return [w for w in self.workers if w.state is WorkerState.READY]

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {w.name: w.child.pid for w in self.workers if w.child is not None}

    def steps(self) -> dict[str, tuple[int, int]]:
        """name -> (how often it was started, engine steps since)."""
        return {w.name: (w.starts, w.steps) for w in self.ready()}

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a worker: for tests and demonstrations of what then happens."""
        for worker in self.workers:
            if worker.name == name:
                worker.signal(number)
                return
        raise BadInput(
            problem(
                f"there is no worker {name!r}",
                consequence="Nothing was killed",
                remedy=f"The workers are {[w.name for w in self.workers]}",
            )
        )
