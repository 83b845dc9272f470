"""The coordinator: one thread that owns the job log and looks after the workers.

It does nothing on a hunch. A rollout is submitted after its attempt is durable; it is finished after its tokens are
durable in the engine log and its Finish in the job log; a death is believed when the process is gone; and then the
engine log, not what the worker had told, says where the rollout stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import selectors
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from numpy.typing import NDArray

from ..engines.base import FinishReason
from ..episode import Episodes, turn_sampling, turn_start
from ..errors import BackendError, BadInput, MissingExtra, ProvenanceError, WorkerFailed, problem
from ..finish import finish_reason
from ..job_state import Rollout, Status
from ..kv.snapshots import KvConfig
from ..params import SamplingParams
from ..stops import StopWatch
from ..stream import Stream
from ..wal import RolloutWal
from .dispatch import Failed, Observed, stopped
from .finished import FinishedRollout
from .nursery import Nursery
from .outlet import Outlet
from .poison import PoisonRule, Quarantine, Verdict
from .pool import WorkerHandle, WorkerState
from .spec import EngineSpec
from .turns import Turns
from .update import WeightsUpdate
from .wire import Message
from .worker import error_from_message, info_from_message

T = TypeVar("T")
_TICK_S = 0.2
#: Deaths in a row before a worker was ready: of those that say why, and of those that do not (killed, as a rule).
_TOLD_FAILURES = 3
_SILENT_DEATHS = 20


@dataclass(slots=True)
class Stats:
    """Counters of one backend's life. Read them at any time; they only grow, but for the last five."""

    deaths: int = 0
    resumed: int = 0
    """Attempts that went on after a death."""
    tokens_prefilled: int = 0
    """Output tokens that a resume computed again by prefill."""
    tokens: int = 0
    """Output tokens that became durable."""
    finished: int = 0
    seconds_resuming: float = 0.0
    """From each death to the moment its rollouts were running again, summed over rollouts."""
    tokens_loaded: int = 0
    """Output tokens of resumed rollouts whose KV was loaded from a snapshot instead."""
    seconds_loading: float = 0.0
    """What reading snapshots took, summed over rollouts."""
    snapshots: int = 0
    """Times that a rollout's KV became durable."""
    kv_fallbacks: Counter[str] = field(default_factory=Counter)
    """Resumes that could not load all they had, by reason; "missing" where there was no snapshot."""
    turns: int = 0
    """Turns that were answered."""
    tool_calls: int = 0
    """Calls that tools were given, repeated ones included."""
    calling: int = 0
    """Rollouts that wait for their tools."""
    in_flight: int = 0
    waiting: int = 0
    durable_lag_bytes: int = 0
    workers_ready: int = 0


class Coordinator(threading.Thread):
    """See the module. `call` runs a function on the thread; everything else is for the thread itself."""

    def __init__(
        self,
        wal: RolloutWal,
        spec: EngineSpec,
        *,
        workers: int,
        slots: int,
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
        self._spec = spec
        self._slots = slots
        self._first_version = first_version
        self._quarantine = Quarantine(poison)
        self._witness = witness
        self._grace_s = grace_s
        self._take_over = take_over
        self._kv = kv
        self._nursery = Nursery(spec.module, threads=spec.threads)
        self._workers = [WorkerHandle(f"{i}", wal.engine_path(f"{i}")) for i in range(workers)]
        self._recovered = [r.id for r in wal.in_flight()]
        self._pending: deque[int] = deque()
        self._died_at: dict[int, float] = {}
        self._over: dict[int, tuple[FinishReason, int]] = {}
        self._outlets: dict[int, Outlet] = {}
        self._stops = StopWatch(spec.model)
        self._update: WeightsUpdate | None = None
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._closing = False
        self._turns = Turns(wal, episodes, self._wake) if episodes is not None else None

    # -- from other threads -------------------------------------------------------------------------------------

    def call(self, what: Callable[[], T]) -> T:
        """Run `what` on the coordinator's thread and return what it returns, or raise what it raises."""
        if threading.current_thread() is self:
            return what()
        if not self.is_alive():
            raise self.failure()
        future = self.post(what)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self.is_alive() and not future.done():
                    raise self.failure() from None

    def post(self, what: Callable[[], T]) -> Future[T]:
        """Have `what` run on the coordinator's thread, and do not wait for it. Safe anywhere, a finalizer included."""
        future: Future[T] = Future()
        self._commands.append((what, future))
        self._wake()
        return future

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._wake_w.send(b"\0")

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
            for worker in self._workers:
                self._start(worker)
            while not self._closing:
                self._tick()
            if self._turns is not None:
                self._turns.stop_dispatching()
            self._stop_workers()
            if self._turns is not None:
                self._turns.close(self._grace_s)
                self._hear_tools()
                self.wal.wait_durable()
        except BaseException as error:  # everything that waits must hear of it
            self.error = error
            for worker in self._workers:
                worker.signal(signal.SIGKILL)
        finally:
            self.ready.set()
            for outlet in self._outlets.values():
                outlet.put(self.failure())
            if self._turns is not None:
                self._turns.close(0.0)
            while self._commands:
                self._commands.popleft()[1].set_exception(self.failure())
            if self._update is not None:
                self._update.give_up(self.failure())
            for worker in self._workers:
                worker.dead(5.0)
                worker.bury()
            self._nursery.close()
            self._selector.close()
            self._wake_r.close()
            self._wake_w.close()

    def _tick(self) -> None:
        for key, _ in self._selector.select(_TICK_S):
            if key.fileobj is self._wake_r:
                self._wake_r.recv(4096)
            else:
                self._hear(key.data)
        for worker in self._workers:
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
                self._bury(worker)
        while self._commands:
            what, future = self._commands.popleft()
            try:
                future.set_result(what())
            except Exception as error:
                future.set_exception(error)
                if self.wal.log.writer.poisoned:
                    raise
        if self._update is not None and self._update.advance():
            self._update = None
        self._hear_tools()
        self._settle()
        self._schedule()
        self._refresh()

    def _refresh(self) -> None:
        stats = self.stats
        stats.in_flight = sum(len(w.running) for w in self._workers)
        stats.waiting = len(self._pending) + len(self._quarantine.waiting)
        if self._turns is not None:
            stats.calling, stats.tool_calls = len(self._turns), self._turns.calls
        stats.workers_ready = sum(w.state is WorkerState.READY for w in self._workers)
        stats.durable_lag_bytes = sum(w.lag_bytes for w in self._workers)

    # -- workers ------------------------------------------------------------------------------------------------

    def _start(self, worker: WorkerHandle) -> None:
        policy = self.wal.state.policy
        config: Message = {
            "spec": self._spec.to_message(),
            "log": str(worker.log),
            "segment_bytes": self.wal.segment_bytes,
            "policy": {
                "kind": self.wal.policy.kind,
                "group_ms": self.wal.policy.group_ms,
                "group_bytes": self.wal.policy.group_bytes,
            },
            "weights": (
                {"version": policy.version, "digest": policy.weights_digest, "source": policy.source}
                if policy
                else None
            ),
            "first_version": self._first_version,
            "witness": self._witness,
            "take_over": self._take_over,
        }
        if self._kv is not None:
            config["kv"] = {
                "config": self._kv.to_message(),
                "alive": [r.id for r in self.wal.in_flight()],
                "last": max(self.wal.state.rollouts, default=0),
            }
        child, sock = self._nursery.fork(config)
        worker.born(child, sock)
        self._selector.register(sock, selectors.EVENT_READ, worker)

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
                    self._update.give_up(error_from_message(message))
                case "refused":
                    self._refused(worker, message)
                case "resumed":
                    self._resumed(message)
                case "snapshots":
                    self.stats.snapshots += message["count"]
                case "failed":
                    worker.failure = error_from_message(message)

    def _welcome(self, worker: WorkerHandle, message: Message) -> None:
        info = info_from_message(message["info"])
        if self.wal.state.policy is None:
            self.wal.declare_policy(message["version"], info.weights_digest, self._spec.model)
        self.wal.declare_engine(info)
        self.wal.wait_durable()
        worker.state = WorkerState.READY
        worker.failures = 0
        recovered, self._recovered = self._recovered, []
        self._requeue(recovered)
        self.ready.set()

    def _frames(self, worker: WorkerHandle, message: Message) -> None:
        bound, over, tokens = worker.apply(message["frames"])
        for key in bound:
            if key[0] in self.wal.state.rollouts:
                self.wal.streams[key] = worker.mirror.streams[key]
            else:  # aborted and released before the worker had begun with it
                worker.forget([key])
        worker.steps, worker.lag_bytes = message["steps"], message["lag_bytes"]
        self.stats.tokens += tokens
        watched = [r for r in worker.running if r in self._stops]
        if over or watched:
            worker.mirror.finish()
        for rollout in watched:
            cut = self._find_stop(self.wal.streams.get((rollout, worker.running[rollout])), rollout)
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
        self.stats.tokens_loaded += message["loaded"]
        self.stats.tokens_prefilled += message["prefilled"]
        self.stats.seconds_loading += message["seconds"]
        if message["reason"] not in {"", "partial"}:
            self.stats.kv_fallbacks[message["reason"]] += 1

    def _find_stop(self, stream: Stream | None, rollout: int) -> int | None:
        if stream is None or not stream.length:
            return None

        def last(count: int) -> NDArray[Any]:
            # Beyond this attempt's tokens only in its first moments, and then all of them are few or looked at once.
            return stream.last(count) if count <= stream.length else self.wal.tokens(rollout).token_T[-count:]

        return self._stops.check(rollout, stream.start + stream.length, last)

    def _end(self, worker: WorkerHandle, rollout: int, reason: FinishReason, count: int) -> None:
        worker.running.pop(rollout, None)
        self._stops.forget(rollout)
        self._over[rollout] = (reason, count)

    def _refused(self, worker: WorkerHandle, message: Message) -> None:
        """The engine cannot honour a request: that is an end, and it is told."""
        if worker.running.pop(message["rollout"], None) is None:
            return  # aborted meanwhile
        self._censor(message["rollout"], f"refused: {message['error']}")

    def _bury(self, worker: WorkerHandle) -> None:
        """A worker is gone, or as good as: find out from its log where its rollouts stand."""
        if worker.channel is not None:
            self._hear(worker)  # what it had still said
            self._selector.unregister(worker.channel.sock)
        if not worker.dead(self._grace_s if worker.state is WorkerState.STOPPING else 1.0):
            worker.signal(signal.SIGKILL)
            if not worker.dead(30.0):
                raise WorkerFailed(
                    problem(
                        f"worker {worker.name} does not die of SIGKILL",
                        consequence="Its log cannot be taken over while it may still write",
                        remedy="The machine hangs in I/O, as a rule; restart it. Everything acknowledged is in the log",
                    )
                )
        started = worker.state is not WorkerState.STARTING
        self._quarantine.died(worker)
        running = dict(worker.running)
        worker.bury()
        self.wal.absorb(worker.name)
        worker.running.clear()
        now = time.monotonic()
        self.stats.deaths += 1
        for rollout in running:
            self._died_at[rollout] = now
        self._requeue(running)
        if self._update is not None:
            self._update.died(worker)
        if not started:
            self._failed_to_start(worker)
        if not self._closing:
            self._start(worker)

    def _failed_to_start(self, worker: WorkerHandle) -> None:
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

    def _stop_workers(self) -> None:
        """Preempt all in good order; whoever does not stop within the grace time is killed."""
        deadline = time.monotonic() + self._grace_s
        for worker in self._workers:
            if worker.state is not WorkerState.DEAD:
                worker.state = WorkerState.STOPPING
                worker.signal(signal.SIGTERM)
                worker.send({"t": "stop"})
        for worker in self._workers:
            while worker.channel is not None and not worker.dead(0.02) and time.monotonic() < deadline:
                self._hear(worker)
            worker.signal(signal.SIGKILL)
            worker.dead(5.0)
            if worker.channel is not None:
                self._hear(worker)
        self._settle()

    # -- rollouts -----------------------------------------------------------------------------------------------

    def enqueue(self, rollouts: Iterable[int]) -> None:
        """Begun and durable: they may run."""
        self._pending.extend(rollouts)

    def attach(self, cohort: int, outlet: Outlet) -> None:
        """Have the rollouts of a cohort come out here: first those that were ready and not consumed."""
        if (earlier := self._outlets.get(cohort)) is not None:
            earlier.put(
                BackendError(
                    problem(
                        f"cohort {self.wal.state.cohorts[cohort].record.name!r} was asked for again by a later call",
                        consequence="This iterator ends here; what it had not yet handed over comes out there",
                        remedy="Iterate over a cohort in one place at a time",
                    )
                )
            )
        self._outlets[cohort] = outlet
        members = [r for r in self.wal.state.rollouts.values() if r.begin.cohort == cohort and r.consumed is None]
        outlet.wanted = {r.id for r in members}
        outlet.expected = len(members)
        for r in members:
            if r.status is not Status.IN_FLIGHT:
                self._deliver(r.id)
        if not members:
            outlet.put(None)

    def detach(self, cohort: int, outlet: Outlet) -> None:
        """Nobody listens there any more. The rollouts go on."""
        if self._outlets.get(cohort) is outlet:
            del self._outlets[cohort]

    def abort(self, rollout: int, reason: str) -> None:
        """End a rollout as censored."""
        r = self.wal.rollout(rollout)
        if r.status is not Status.IN_FLIGHT or rollout in self._over:
            return
        for worker in self._workers:
            if rollout in worker.running:
                worker.send({"t": "abort", "rollout": rollout})
                worker.mirror.finish()
                worker.running.pop(rollout)
        for waiting in (self._pending, self._quarantine.waiting):
            if rollout in waiting:
                waiting.remove(rollout)
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

    def _requeue(self, rollouts: Iterable[int]) -> None:
        """Rollouts whose engine is dead: end those that were over, or must be given up; the others go on first."""
        again: list[int] = []
        for rollout in rollouts:
            r = self.wal.rollout(rollout)
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
        self._pending.extendleft(reversed(again))

    def _schedule(self) -> None:
        """Give waiting rollouts to the workers that have room, the least loaded first."""
        if self._update is not None:
            return
        ready = [w for w in self._workers if w.state is WorkerState.READY and not self._quarantine.occupies(w)]
        chosen: list[tuple[WorkerHandle, Rollout, int]] = []
        if self._quarantine.waiting and ready:
            # A suspect waits for an empty worker. One worker takes nothing new until it is.
            worker = min(ready, key=lambda w: len(w.running))
            ready.remove(worker)
            if not worker.running:
                chosen.append(self._assign(worker, self._quarantine.waiting.popleft()))
                self._quarantine.enter(worker, chosen[0][1].id, chosen[0][2])
        while self._pending and ready:
            worker = min(ready, key=lambda w: len(w.running))
            if len(worker.running) >= self._slots:
                break
            chosen.append(self._assign(worker, self._pending.popleft()))
        if not chosen:
            return
        # The attempts must be durable before any engine hears of them: a later owner must be able to tell which of
        # two engines that both hold tokens of a rollout is the one that counts.
        self.wal.wait_durable()
        for worker, r, attempt in chosen:
            self._submit(worker, r, attempt)

    def _assign(self, worker: WorkerHandle, rollout: int) -> tuple[WorkerHandle, Rollout, int]:
        r = self.wal.rollout(rollout)
        cause = "turn" if r.answered else "resume" if r.attempts else "start"
        attempt = self.wal.attempt(r.id, worker.name, cause)
        worker.running[r.id] = attempt.attempt
        return worker, r, attempt.attempt

    def _submit(self, worker: WorkerHandle, r: Rollout, attempt: int) -> None:
        tokens = self.wal.tokens(r.id)
        died = self._died_at.pop(r.id, None)
        if died is not None:
            self.stats.seconds_resuming += time.monotonic() - died
        cause = r.attempts[-1].cause
        if cause == "resume":
            self.stats.resumed += 1
            if self._kv is None:  # otherwise the worker will say
                self.stats.tokens_prefilled += len(tokens)
        sampling = turn_sampling(r.begin)
        if sampling["stop"]:
            # What is there has been looked at, or the rollout would not go on.
            observed = len(tokens) - int(tokens.sampled_T.sum())
            least = sampling["min_tokens"] + observed if sampling["min_tokens"] else 0
            self._stops.watch(r.id, tuple(sampling["stop"]), min_tokens=least, seen=len(tokens))
        worker.send(
            {
                "t": "submit",
                "rollout": r.id,
                "attempt": attempt,
                "cause": cause,
                "prompt": r.begin.prompt.tobytes(),
                "prefix": tokens.token_T.tobytes(),
                "sampled": tokens.sampled_T.tobytes(),
                "sampling": sampling,
                "key": noise_key(r.begin.seed, r.begin.noise, attempt),
            }
        )

    def _is_over(self, r: Rollout) -> bool:
        """Evaluate the whole finish predicate on what the logs hold, before anything is decoded further."""
        assert self.wal.info is not None
        tokens = self.wal.tokens(r.id)
        sampling = SamplingParams.from_dict(turn_sampling(r.begin))
        length = len(tokens)
        if sampling.stop:
            # What earlier turns said has been answered, and what was observed ends nothing.
            observed = length - int(tokens.sampled_T.sum())
            least = sampling.min_tokens + observed if sampling.min_tokens else 0
            cut = StopWatch.first_stop(self._stops.tokenizer, sampling.stop, tokens.token_T, least, seen=turn_start(r))
            if cut is not None:
                self._over[r.id] = (FinishReason.STOP_STRING, cut)
                return True
        reason = finish_reason(
            int(tokens.token_T[-1]) if length and tokens.sampled_T[-1] else None,
            sampled=int(tokens.sampled_T.sum()),
            length=len(r.begin.prompt) + length,
            sampling=sampling,
            eos_token_ids=self.wal.info.eos_token_ids,
            max_context=self.wal.info.max_context,
        )
        if reason is FinishReason.RUNNING:
            return False
        self._over[r.id] = (reason, length)
        return True

    def _censor(self, rollout: int, reason: str, *, count: int | None = None) -> None:
        self._stops.forget(rollout)
        self.wal.censor(rollout, reason, count=count)
        self.wal.wait_durable()
        self._ended(rollout)

    def _settle(self) -> None:
        """Finish what is over: the Finish records in one group, and delivery only once they are durable.

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

    def _ended(self, rollout: int) -> None:
        """It has ended, durably. Tools let go of it before it is handed over: whoever gets it may look at what they
        have left."""
        if self._turns is None or not self._turns.release(rollout):
            self._deliver(rollout)

    def _hear_tools(self) -> None:
        """What tools have answered. Their own log holds it durably; ours must before an engine goes on behind it, which
        `_schedule` sees to."""
        for answer in self._turns.answers() if self._turns is not None else ():
            r = self.wal.state.rollouts.get(answer.rollout)
            if isinstance(answer, Observed) and r is not None and self.wal.info is not None:
                room = self.wal.info.max_context - len(r.begin.prompt) - answer.position
                self.wal.observe(r.id, answer.token_T[:room], position=answer.position)
                self.stats.turns += 1
                if not self._is_over(r):
                    self._pending.appendleft(r.id)
            elif isinstance(answer, Failed):
                if answer.fatal is not None:
                    raise stopped(answer.fatal) from answer.fatal
                self._censor(answer.rollout, answer.reason, count=answer.position)
            elif r is not None:
                self._deliver(answer.rollout)

    def _deliver(self, rollout: int) -> None:
        """Hand a rollout over. Whatever justifies it is durable, and this owner was not fenced after the sync."""
        r = self.wal.state.rollouts[rollout]
        outlet = self._outlets.get(r.begin.cohort)
        if outlet is None or rollout not in outlet.wanted:
            return  # it waits in the table until somebody attaches
        cohort = self.wal.state.cohorts[r.begin.cohort].record
        tokens = self.wal.tokens(rollout)
        self.wal.log.fence.check()
        again = r.delivered
        if not again:
            self.wal.delivered([rollout])
            self.stats.finished += 1
        outlet.wanted.discard(rollout)
        outlet.put(
            FinishedRollout(
                id=rollout,
                key=f"{cohort.name}/{r.begin.index}",
                cohort=cohort.name,
                index=r.begin.index,
                group=r.begin.group,
                prompt=r.begin.prompt,
                output=tokens,
                finish_reason=FinishReason(r.finish.reason) if r.finish else FinishReason.RUNNING,
                censored=r.censor.reason if r.censor else None,
                seed=r.begin.seed,
                interruptions=r.interruptions,
                metadata=r.begin.metadata,
                again=again,
                episode=self._turns.episode(rollout) if self._turns is not None and r.begin.turns else "",
                turns=len(r.observed),
                spans=self._turns.spans(r, tokens) if self._turns is not None else (),
            )
        )
        if not outlet.wanted:
            outlet.put(None)

    # -- weights ------------------------------------------------------------------------------------------------

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
        self.check_version(version)
        self._update = WeightsUpdate(self.wal, self._workers, version, source)
        return self._update.done

    def check_version(self, version: int) -> None:
        """Raises BadInput: a later version is in force. The same one may be loaded again, if it is the same."""
        policy = self.wal.state.policy
        if policy is not None and version < policy.version:
            raise BadInput(
                problem(
                    f"policy version {version} does not follow the logged version {policy.version}",
                    consequence="The weights were not changed",
                    remedy=f"Pass a version of {policy.version + 1} or later",
                )
            )

    # -- control ------------------------------------------------------------------------------------------------

    def worker_pids(self) -> dict[str, int]:
        return {w.name: w.child.pid for w in self._workers if w.child is not None}

    def worker_steps(self) -> dict[str, tuple[int, int]]:
        """name -> (how often it was started, engine steps since)."""
        return {w.name: (w.starts, w.steps) for w in self._workers if w.state is WorkerState.READY}

    def kill(self, name: str, number: int) -> None:
        """Send a signal to a worker: for tests and demonstrations of what then happens."""
        for worker in self._workers:
            if worker.name == name:
                worker.signal(number)
                return
        raise BadInput(
            problem(
                f"there is no worker {name!r}",
                consequence="Nothing was killed",
                remedy=f"The workers are {[w.name for w in self._workers]}",
            )
        )

    def load_tokenizer(self) -> None:
        """For stop strings; raises what `StopWatch.tokenizer` raises."""
        _ = self._stops.tokenizer

    def shut(self) -> None:
        self._closing = True


def noise_key(seed: int, noise: str, attempt: int) -> int:
    """The 64-bit key of a rollout's noise: the seed itself, or, drawn afresh at each resume, seed and attempt."""
    if noise == "position":
        return seed
    h = hashlib.blake2b(seed.to_bytes(8, "little") + attempt.to_bytes(8, "little"), digest_size=8)
    return int.from_bytes(h.digest(), "little")
