"""A worker process: one engine, one engine log, one socket to the backend.

The order of things is the whole point. A step is appended to the log; the sync runs while the next step computes; and
only when the step is durable are its frames sent on. What the backend has seen is therefore always in the log.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import errors
from ..engine_state import EngineState
from ..engines.base import Engine, EngineInfo, Request
from ..errors import ArchitectureMismatch, BackendError, BadInput, RolloutWalError, problem
from ..kv.snapshots import KvConfig, Resumed, Snapshots, Snapshotted
from ..log.policy import SyncPolicy
from ..log.report import Reporter
from ..params import SamplingParams
from ..records import RecordType
from ..wal import open_engine_log
from .spec import EngineSpec
from .wire import Channel, Message, wait_for

_IDLE_S = 0.2
_SHOWN = frozenset({RecordType.BIND, RecordType.STEP, RecordType.POLICY})


def info_message(info: EngineInfo) -> dict[str, Any]:
    """EngineInfo as plain types."""
    return {**asdict(info), "eos_token_ids": list(info.eos_token_ids), "extras": dict(info.extras)}


def info_from_message(raw: dict[str, Any]) -> EngineInfo:
    return EngineInfo(**{**raw, "eos_token_ids": tuple(raw["eos_token_ids"])})


class Worker:
    """See the module. `run` returns when the backend is gone, asks it to, or SIGTERM comes."""

    def __init__(self, channel: Channel, config: Message) -> None:
        self._channel = channel
        self._witness: Channel | None = None
        if config.get("witness"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(config["witness"])
            self._witness = Channel(sock)
        self._spec = EngineSpec.from_message(config["spec"])
        self._backend: int = config["backend"]
        self._log = open_engine_log(
            Path(config["log"]),
            config["segment_bytes"],
            SyncPolicy(**config["policy"]),
            take_over=config["take_over"],
        )
        self._log.state = EngineState()  # the backend has read it
        self._log.held = deque()
        self._reporter = Reporter(self._log.log.writer)
        policy = config["weights"]  # {"version", "digest", "source"} or None in a new job
        self._engine: Engine = self._spec.build(policy["version"] if policy else config["first_version"])
        if policy and self._engine.info.weights_digest != policy["digest"]:
            self._load_logged(policy)
        self._tells_resumes = bool(config.get("kv"))
        self._kv_over: set[int] = set()
        """Rollouts that are over here, and not before `_kv_oldest`."""
        self._kv_oldest = 0
        """No earlier rollout is in flight anywhere: what is over is remembered one by one only from here on."""
        self._kv = self._open_kv(KvConfig(**config["kv"])) if config.get("kv") else None
        self._log.engine(info_message(self._engine.info))
        self._log.policy(
            self._engine.policy_version, self._engine.info.weights_digest, policy["source"] if policy else ""
        )
        self._slot_of: dict[int, int] = {}
        self._rollout_at: dict[int, int] = {}
        self._free: list[int] = []
        self._next_slot = 0
        self._prepared: Message | None = None
        self._stopping = False
        self._steps = 0
        self._attempt_of: dict[int, int] = {}

    def _load_logged(self, policy: Message) -> None:
        """The model's folder does not hold the weights in force: they were replaced since. What cannot be loaded, or
        turns out to be something else, the backend refuses, with both digests named."""
        source = Path(policy["source"])
        if source.is_dir() and source != Path(self._spec.model):
            with contextlib.suppress(ArchitectureMismatch):
                self._engine.load_weights(source, policy["version"])

    def _open_kv(self, config: KvConfig) -> Snapshots | None:
        told = self._told_begun()
        begun, resumable = told["last"], set(told["alive"])

        def alive(rollout: int) -> bool:
            if rollout < self._kv_oldest or rollout in self._kv_over:
                return False
            return rollout > begun or rollout in resumable

        kv = Snapshots.open(config, self._engine, alive)
        if kv is not None:
            kv.collect()
        return kv

    def _told_begun(self) -> Message:
        """Which rollouts could be resumed when this worker was started, and the last id: the backend's first message.

        Raises:
            BackendError: the backend is gone.
        """
        while (told := self._channel.receive_one(_IDLE_S)) is None:
            if self._channel.closed or wait_for(self._backend, select.POLLIN, 0.0):
                raise BackendError(
                    problem(
                        "the backend ended while this worker started",
                        consequence="The worker ends; nothing was sampled",
                        remedy="Start the backend again",
                    )
                )
        return told

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stopping", True))
        self._log.wait_durable()
        self._release()
        self._channel.send(
            {
                "t": "ready",
                "info": info_message(self._engine.info),
                "version": self._engine.policy_version,
                "pid": os.getpid(),
            }
        )
        while not self._stopping and not self._channel.closed and not wait_for(self._backend, select.POLLIN, 0.0):
            self._receive(0.0 if self._may_step() or self._log.held else _IDLE_S)
            # Asked again: what was received may be new weights, of which nothing may be sampled yet.
            if busy := self._may_step():
                self._step()
            if self._log.held:
                if not busy:
                    self._log.wait_durable()
                self._release()
        self._stop()

    def _may_step(self) -> bool:
        return self._engine.unfinished > 0 and self._prepared is None

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        out = self._engine.step()
        self._steps += 1
        if not len(out.slot_N):
            return
        self._log.append_step(out.slot_N, out.token_N, out.finish_N, out.logprob_N, out.sampling_logprob_N)
        for slot in out.slot_N[out.finish_N != 0].tolist():
            self._over(slot)
        self._log.sync_soon()
        if self._kv is not None:
            self._kv.stepped(out.slot_N, self._rollout_at)
            self._log_snapshots(self._kv.saved())

    def _over(self, slot: int) -> None:
        """The rollout in a slot has ended, or was aborted: its KV is needed no more."""
        rollout = self._rollout_at[slot]
        self._free_slot(slot)
        if self._kv is not None:
            self._kv_over.add(rollout)
            self._kv.finished(rollout)

    def _log_snapshots(self, snapshots: Iterable[Snapshotted]) -> None:
        """They are durable: say so, each for the attempt that runs."""
        logged = 0
        for s in snapshots:
            if s.rollout in self._attempt_of:
                self._log.snapshot(s.rollout, self._attempt_of[s.rollout], s.tokens, s.key)
                logged += 1
        if logged:
            self._channel.send({"t": "snapshots", "count": logged})

    def _release(self) -> None:
        # What else is in the log is for whoever reads it back: a checkpoint repeats what was shown long ago.
        frames = [f for f in self._log.take_durable() if f.type in _SHOWN]
        if not frames:
            return
        message = {
            "t": "frames",
            "steps": self._steps,
            "lag_bytes": self._log.log.writer.pending_bytes,
            "writer": self._reporter.message(),
            "frames": [[f.type, f.flags, f.lsn, bytes(f.payload)] for f in frames],
        }
        if self._witness is not None:
            # The witness first: the test that relies on it asks for everything that anybody was shown.
            self._witness.send(message)
            self._witness.drain(5.0)
        self._channel.send(message)

    def _stop(self) -> None:
        """Preempted in good order: everything sampled is durable and sent; then the process ends."""
        self._log.wait_durable()
        self._release()
        if self._kv is not None:
            # Not without a backend: its successor may be waiting for this log already.
            if not wait_for(self._backend, select.POLLIN, 0.0):
                self._log_snapshots(self._kv.save(self._slot_of))
                self._log.wait_durable()
            self._kv.close()
        self._channel.send({"t": "stopped"})
        self._channel.drain(5.0)
        self._log.close()
        self._engine.close()

    # -- what the backend asks ----------------------------------------------------------------------------------

    def _receive(self, timeout_s: float) -> None:
        for message in self._channel.receive(timeout_s):
            match message["t"]:
                case "submit":
                    self._submit(message)
                case "abort":
                    self._abort(message["rollout"])
                case "forget":
                    self._log.forget(message["rollouts"])
                    self._log.clean()
                case "prepare":
                    self._prepare(message)
                case "commit":
                    self._commit(message)
                case "stop":
                    self._stopping = True

    def _submit(self, message: Message) -> None:
        slot = self._free.pop() if self._free else self._next_slot
        prefix = np.frombuffer(message["prefix"], np.int32)
        try:
            request = Request(
                slot,
                np.frombuffer(message["prompt"], np.int32),
                prefix,
                np.frombuffer(message["sampled"], np.bool_),
                SamplingParams.from_dict(message["sampling"]),
                message["key"],
            )
            if self._kv is not None and message["attempt"] > 1:
                resumed = self._kv.add(message["rollout"], request)
            else:
                self._engine.add(request)
                resumed = Resumed(0, 0.0, "unavailable" if message["attempt"] > 1 else "")
        except BadInput as error:
            self._channel.send({"t": "refused", "rollout": message["rollout"], "error": str(error)})
            if slot != self._next_slot:
                self._free.append(slot)
            return
        self._next_slot = max(self._next_slot, slot + 1)
        self._slot_of[message["rollout"]] = slot
        self._rollout_at[slot] = message["rollout"]
        self._attempt_of[message["rollout"]] = message["attempt"]
        self._kv_over.discard(message["rollout"])  # its last turn was over, it is not
        if message["oldest"] > self._kv_oldest:
            self._kv_oldest = message["oldest"]
            self._kv_over = {r for r in self._kv_over if r >= self._kv_oldest}
        if self._tells_resumes and len(prefix) and message["cause"] == "resume":
            loaded = max(0, resumed.loaded - len(request.prompt))
            self._channel.send(
                {
                    "t": "resumed",
                    "loaded": loaded,
                    "prefilled": len(prefix) - loaded,
                    "seconds": resumed.seconds,
                    "reason": resumed.reason,
                }
            )
        self._log.bind(slot, message["rollout"], message["attempt"], len(prefix))

    def _abort(self, rollout: int) -> None:
        slot = self._slot_of.get(rollout)
        if slot is not None:
            self._engine.abort(slot)
            self._over(slot)

    def _free_slot(self, slot: int) -> None:
        rollout = self._rollout_at.pop(slot, None)
        if rollout is not None:
            del self._slot_of[rollout]
            del self._attempt_of[rollout]
            self._free.append(slot)

    def _prepare(self, message: Message) -> None:
        """Load the new weights at this step boundary, and sample nothing until the backend has logged them."""
        self._log.wait_durable()
        self._release()
        if self._kv is not None:
            self._kv.before_update(self._slot_of)
        # Whatever comes of it: a load that failed half-way leaves weights that nobody declared (I6). The backend ends
        # this process then, and no token may be sampled until it does.
        self._prepared = message
        try:
            self._engine.load_weights(Path(message["source"]), message["version"])
        except Exception as error:  # a file that is cut short or not there yet: whatever the libraries make of it
            self._channel.send({"t": "unprepared", "version": message["version"], **_told(error)})
            return
        if self._kv is not None:
            self._kv.updated()
        digest = self._engine.info.weights_digest
        self._channel.send({"t": "prepared", "version": message["version"], "digest": digest})

    def _commit(self, message: Message) -> None:
        self._log.policy(message["version"], message["digest"], message["source"])
        self._prepared = None
        self._log.wait_durable()
        self._release()
        self._channel.send({"t": "committed", "version": message["version"]})


def worker_main(sock: socket.socket, config: Message) -> int:
    """Run a worker; returns its exit status. A failure is told to the backend before the process ends."""
    channel = Channel(sock)
    try:
        Worker(channel, config).run()
    except BaseException as error:
        if not isinstance(error, RolloutWalError):
            traceback.print_exc()
        channel.send({"t": "failed", **_told(error)})
        channel.drain(2.0)
        return 1
    return 0


def _told(error: BaseException) -> Message:
    return {"kind": type(error).__name__, "error": str(error)}


def error_from_message(message: Message) -> RolloutWalError:
    """The error that a worker told of, as one of the same type if it is one of this package."""
    cls = getattr(errors, message["kind"], None)
    if isinstance(cls, type) and issubclass(cls, RolloutWalError) and not issubclass(cls, errors.MissingExtra):
        return cls(message["error"])
    return errors.BackendError(f"{message['kind']}: {message['error']}")
