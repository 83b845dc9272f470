"""The coordinator: one thread that owns the job log and looks after the workers.

It does nothing on a hunch. A rollout is submitted after its attempt is durable (`scheduler`); it is finished after its
tokens are durable in the engine log and its Finish in the job log (`_settle`); a death is believed when the process is
gone (`fleet`); and then the engine log, not what the worker had told, says where the rollout stands (`_bury`).

What needs no other room is here: what workers say, how rollouts end, what callers ask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from ..engines.base import FinishReason
from ..episode import Episodes
from ..errors import BackendError, problem
from ..job_state import Rollout, Status
from ..kv.snapshots import KvConfig
from ..provenance import check_follows
from ..records import Censor
from ..wal import RolloutWal
from .commands import Commands
from .dispatch import Failed, Observed, stopped
from .endings import Endings
from .fleet import Fleet
from .handover import Handover
from .poison import PoisonRule, Quarantine, Verdict
from .pool import WorkerHandle, WorkerState
from .scheduler import Scheduler
from .spec import EngineSpec
from .stats import Stats
from .turns import Turns
from .update import WeightsUpdate
from .wire import Message
from .worker import error_from_message, info_from_message

T = TypeVar("T")
_TICK_S = 0.2


class Coordinator(threading.Thread):
    """See the module. `call` and `post` are for other threads; everything else is for the thread itself."""

    def __init__(
        self,
        wal: RolloutWal,
        spec: EngineSpec,
        *,
        workers: int,
        slots: int,
        devices: Sequence[str] | None = None,
        first_version: int,
        poison: PoisonRule,
        witness: str | None,
        grace_s: float,
        take_over: bool,
        kv: KvConfig | None = None,
        episodes: Episodes | None = None,
    ) -> None:
        super().__init__(name="rollout-wal-coordinator", daemon=True)
        self.wal = wal
        self.stats = Stats()
        self.error: BaseException | None = None
        self.ready = threading.Event()
        """Set when the first worker has said what it runs, or when that has become impossible."""
        self._model = spec.model
        self._grace_s = grace_s
        self._commands = Commands(self, self.failure)
        self.fleet = Fleet(
            wal,
            spec,
            self._commands,
            workers=workers,
            devices=devices,
            first_version=first_version,
            witness=witness,
            grace_s=grace_s,
            take_over=take_over,
            kv=kv,
        )
        self._workers = self.fleet.workers
        self._quarantine = Quarantine(poison)
        self.endings = Endings(wal, spec.model)
        self._scheduler = Scheduler(
            wal, self.fleet, self._quarantine, self.endings, self.stats, slots=slots, workers_tell=kv is not None
        )
        self._turns = Turns(wal, episodes, self._commands.wake) if episodes is not None else None
        self.handover = Handover(wal, self._turns, self.stats)
        self._recovered = [r.id for r in wal.in_flight()]
        self._over: dict[int, tuple[FinishReason, int]] = {}
        """Rollouts that have ended, and are not settled yet."""
        self._update: WeightsUpdate | None = None
        self._closing = False

    # -- from other threads -------------------------------------------------------------------------------------

    def call(self, what: Callable[[], T]) -> T:
        """Run `what` on the coordinator's thread and return what it returns, or raise what it raises."""
        return self._commands.call(what)

    def post(self, what: Callable[[], T]) -> Future[T]:
        """Have `what` run on the coordinator's thread, and do not wait for it. Safe anywhere, a finalizer included."""
        return self._commands.post(what)

    def failure(self) -> BaseException:
        """Why nothing more will happen."""
        if self.error is not None:
            return self.error
        return BackendError(
            problem(
                "the backend was closed",
                consequence="Nothing more is generated; what was in flight is in the log",
                remedy="Open it again on the same directory: it goes on where it was",
            )
        )

    # -- the thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self.fleet.open()
            while not self._closing:
                self._tick()
            if self._turns is not None:
                self._turns.stop_dispatching()
            self.fleet.stop(self._hear)
            self._settle()
            if self._turns is not None:
                self._turns.close(self._grace_s)
                self._hear_tools()
                self.wal.wait_durable()
        except BaseException as error:  # everything that waits must hear of it
            self.error = error
            self.fleet.kill()
        finally:
            self.ready.set()
            self.handover.fail(self.failure())
            if self._turns is not None:
                self._turns.close(0.0)
            self._commands.refuse()
            if self._update is not None:
                self._update.give_up(self.failure())
            self.fleet.close()
            self._commands.close()

    def _tick(self) -> None:
        for worker in self.fleet.listen(_TICK_S):
            self._hear(worker)
        for worker in self.fleet.gone():
            self._bury(worker)
        self._commands.run(fatal=lambda: self.wal.log.writer.poisoned is not None)
        if self._update is not None and self._update.advance():
            self._update = None
        self._hear_tools()
        self._settle()
        if self._update is None:  # while weights are replaced nobody samples
            self._scheduler.schedule()
        self._refresh()

    def _refresh(self) -> None:
        stats = self.stats
        stats.in_flight = sum(len(w.running) for w in self._workers)
        stats.waiting = self._scheduler.waiting
        if self._turns is not None:
            stats.calling, stats.tool_calls = len(self._turns), self._turns.calls
        stats.workers_ready = len(self.fleet.ready())
        stats.durable_lag_bytes = sum(w.lag_bytes for w in self._workers)

    # -- what workers say ---------------------------------------------------------------------------------------

    def _hear(self, worker: WorkerHandle) -> None:
        if worker.channel is None:
            return
        for message in worker.channel.receive():
            match message["t"]:
                case "frames":
                    self._frames(worker, message)
                case "ready":
                    self._welcome(worker, message)
                case "prepared" if self._update is not None:
                    self._update.prepared(worker, message["version"], message["digest"])
                case "committed" if self._update is not None:
                    self._update.committed(worker, message["version"])
                case "unprepared" if self._update is not None:
                    self._update.unprepared(message["version"], error_from_message(message))
                case "refused":
                    self._refused(worker, message)
                case "resumed":
                    self._resumed(message)
                case "snapshots":
                    self.stats.snapshots += message["count"]
                case "stopped":
                    worker.stopping()
                case "failed":
                    worker.failure = error_from_message(message)

    def _welcome(self, worker: WorkerHandle, message: Message) -> None:
        """Provenance (I6): what samples is declared, and checked against the log, before it is given anything."""
        info = info_from_message(message["info"])
        if self.wal.state.policy is None:
            self.wal.declare_policy(message["version"], info.weights_digest, self._model)
        self.wal.declare_engine(info)
        self.wal.wait_durable()
        worker.state = WorkerState.READY
        worker.failures = 0
        recovered, self._recovered = self._recovered, []
        self._requeue(recovered)
        self.ready.set()

    def _frames(self, worker: WorkerHandle, message: Message) -> None:
        """Frames of a worker's log. All of them are durable there (I1): only that makes it right to act on them."""
        bound, over, tokens = worker.apply(message["frames"])
        for key in bound:
            if key[0] in self.wal.state.rollouts:
                self.wal.streams[key] = worker.mirror.streams[key]
            else:  # aborted and released before the worker had begun with it
                worker.forget([key])
        worker.steps, worker.lag_bytes = message["steps"], message["lag_bytes"]
        worker.writer.add(message["writer"])
        self.stats.tokens += tokens
        watched = self.endings.watched(worker.running)
        if over or watched:
            worker.mirror.finish()
        for rollout in watched:
            cut = self.endings.stopped(rollout, worker.running[rollout])
            if cut is not None:
                worker.send({"t": "abort", "rollout": rollout})
                over.discard((rollout, worker.running[rollout]))
                self._end(worker, rollout, FinishReason.STOP_STRING, cut)
        for rollout, attempt in over:
            # An earlier attempt may end late: it had run past a stop string before it heard of that.
            if worker.running.get(rollout) == attempt:
                stream = self.wal.streams[rollout, attempt]
                self._end(worker, rollout, stream.finish, stream.start + stream.length)

    def _resumed(self, message: Message) -> None:
        """A worker has added a rollout that had output already."""
        self.stats.by["kv" if message["loaded"] else "prefill"] += 1
        self.stats.tokens_loaded += message["loaded"]
        self.stats.tokens_prefilled += message["prefilled"]
        self.stats.seconds_loading += message["seconds"]
        if message["reason"] not in {"", "partial"}:
            self.stats.kv_fallbacks[message["reason"]] += 1

    def _refused(self, worker: WorkerHandle, message: Message) -> None:
        """The engine cannot honour a request: that is an end, and it is told."""
        if worker.running.pop(message["rollout"], None) is None:
            return  # aborted meanwhile
        self._censor(message["rollout"], f"refused: {message['error']}")

    def _bury(self, worker: WorkerHandle) -> None:
        """A worker is gone: find out from its log where its rollouts stand (I3), and start its successor."""
        self._hear(worker)  # what it had still said
        started = worker.state is not WorkerState.STARTING
        self.fleet.bury(worker)
        self._quarantine.died(worker)
        running = dict(worker.running)
        self.wal.absorb(worker.name)
        worker.running.clear()
        self.stats.deaths += 1
        self.stats.interruptions += len(running)
        self._scheduler.died(running)
        self._requeue(running)
        if self._update is not None:
            self._update.died(worker)
        if not started:
            self.fleet.failed_to_start(worker)
        if not self._closing:
            self.fleet.start(worker)

    def _requeue(self, rollouts: Iterable[int]) -> None:
        """Rollouts whose engine is dead: end those that were over, or must be given up; the others go on first."""
        again: list[int] = []
        for rollout in rollouts:
            r = self.wal.state.in_flight.get(rollout)
            if r is None:  # given up before any worker was ready
                continue
            if not r.attempts:
                again.append(rollout)
            elif not self._is_over(r):
                match self._quarantine.judge(r, len(self.wal.tokens(rollout))):
                    case Verdict.FREE:
                        again.append(rollout)
                    case Verdict.SUSPECT:
                        self._quarantine.waiting.append(rollout)
                    case Verdict.POISON:
                        self._censor(rollout, "poison")
        self._scheduler.first(again)

    # -- how rollouts end ---------------------------------------------------------------------------------------

    def _is_over(self, r: Rollout) -> bool:
        """Whether it has ended already, by what the logs hold; then it is settled, and not run."""
        if (end := self.endings.of(r)) is None:
            return False
        self._over[r.id] = end
        return True

    def _end(self, worker: WorkerHandle, rollout: int, reason: FinishReason, count: int) -> None:
        worker.running.pop(rollout, None)
        self.endings.forget(rollout)
        self._over[rollout] = (reason, count)

    def _settle(self) -> None:
        """Finish what is over: the Finish records in one group, and delivery only once they are durable (I1).

        What has stopped in a tool call is not over: it is answered first.
        """
        if not self._over:
            return
        over, self._over = self._over, {}
        finished: list[int] = []
        for rollout, (reason, count) in over.items():
            ends = self._turns.take(self.wal.rollout(rollout), reason, count) if self._turns is not None else reason
            if isinstance(ends, str):
                self._censor(rollout, ends, count=count)
            elif ends is not FinishReason.RUNNING:
                self.wal.finish(rollout, ends, count=count)
                finished.append(rollout)
        if finished:
            self.wal.wait_durable()
        for rollout in finished:
            self._ended(rollout)

    def _censor(self, rollout: int, reason: str, *, count: int | None = None) -> None:
        """It ends without having finished, and is handed over all the same: silence would be a bias (I10)."""
        self.wal.censor(rollout, reason, count=count)
        self.wal.wait_durable()
        self.stats.censored[reason.partition(":")[0]] += 1
        self._ended(rollout)

    def _ended(self, rollout: int) -> None:
        """It has ended, durably. Tools let go of it before it is handed over: whoever gets it may look at what they
        have left."""
        self.endings.forget(rollout)
        self._scheduler.over(rollout)
        if self._turns is None or not self._turns.release(rollout):
            self.handover.deliver(rollout)

    def _hear_tools(self) -> None:
        """What tools have answered. Their own log holds it durably (I8); ours must before an engine goes on behind it,
        which the scheduler sees to: an attempt's sync covers the Observe before it."""
        for answer in self._turns.answers() if self._turns is not None else ():
            r = self.wal.state.rollouts.get(answer.rollout)
            if isinstance(answer, Observed) and r is not None and self.wal.info is not None:
                room = self.wal.info.max_context - len(r.begin.prompt) - answer.position
                self.wal.observe(r.id, answer.token_T[:room], position=answer.position)
                self.stats.turns += 1
                if not self._is_over(r):
                    self._scheduler.first([r.id])
            elif isinstance(answer, Failed):
                if answer.fatal is not None:
                    raise stopped(answer.fatal) from answer.fatal
                self._censor(answer.rollout, answer.reason, count=answer.position)
            elif r is not None:
                self.handover.deliver(answer.rollout)

    # -- what callers ask ---------------------------------------------------------------------------------------

    def enqueue(self, rollouts: Iterable[int]) -> None:
        """Begun and durable (I10): they may run."""
        self._scheduler.last(rollouts)

    def abort(self, rollout: int, reason: str) -> None:
        """End a rollout as censored."""
        Censor(rollout, reason, 0).encode()  # what cannot be logged is refused before its worker is told
        r = self.wal.rollout(rollout)
        if r.status is not Status.IN_FLIGHT or rollout in self._over:
            return
        for worker in self._workers:
            if rollout in worker.running:
                worker.send({"t": "abort", "rollout": rollout})
                worker.mirror.finish()
                worker.running.pop(rollout)
        self._censor(rollout, reason, count=self._turns.give_up(rollout) if self._turns is not None else None)

    def consume(self, rollouts: list[int], epoch: int, step: int, release: bool) -> None:
        """Durable when it returns."""
        self.wal.consumed(rollouts, epoch=epoch, step=step)
        if release:
            self.release(rollouts)
        else:
            self.wal.wait_durable()

    def release(self, rollouts: list[int]) -> None:
        """Their tokens are not needed any more; the space they take is given back when it is worth it."""
        keys = {rollout: self.wal.keys(rollout) for rollout in rollouts}
        logs = {a.log for rollout in rollouts for a in self.wal.rollout(rollout).attempts}
        # The engine logs forget only what is durably released: the other way round, a crash in between would leave
        # rollouts in the job log whose tokens are gone.
        self.wal.release(rollouts)
        self.wal.wait_durable()
        for worker in self._workers:
            if worker.name in logs:
                worker.forget(key for of_rollout in keys.values() for key in of_rollout)
                worker.send({"t": "forget", "rollouts": list(keys)})
        self.wal.clean()

    def begin_update(self, version: int, source: str) -> Future[str]:
        """Start replacing the weights everywhere. The future gives their digest once every worker is on them."""
        if self._update is not None:
            raise BackendError(
                problem(
                    f"an update to policy version {self._update.version} is still under way",
                    consequence="The weights were not changed again",
                    remedy="Wait for the first update_weights to return",
                )
            )
        check_follows(version, self.wal.state.policy, same=True)
        self._update = WeightsUpdate(self.wal, self._workers, version, source)
        return self._update.done

    def shut(self) -> None:
        self._closing = True
