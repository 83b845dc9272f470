"""Keeps a student's run alive: starts scoring server and trainer, kills both by the schedule, starts them again.

It knows nothing of what they do: it reads how many batches have been noted, and which process is dead. Killed itself,
it takes both with it, and started again it goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import BackendError, problem
from .config import Job, StudentConfig
from .kills import draw_kills
from .student import METRICS
from .teachers import free_port, write_config

EVENTS = "events.jsonl"
_POLL_S = 0.02
_FAILURES = 3
_SERVER = (
    "from rollout_wal.trainers.mopd.lifeline import die_with_parent; die_with_parent(); "
    "from scoring.serve_command import serve_teachers; serve_teachers()"
)


class Supervisor:
    """One student's run in one folder.

    Args:
        models: where `school.make` left the specialists and the student.
        on_batch: called with the metrics of each batch that was trained on.
    """

    def __init__(
        self,
        config: StudentConfig,
        folder: Path,
        models: Path,
        *,
        on_batch: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.config, self.folder, self.models = config, folder.resolve(), models.resolve()
        self._on_batch = on_batch
        self._metrics_at = 0
        self._newest = 0
        self._durations: list[float] = []
        self._last_time = 0.0
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, int] = {}
        self._failures = 0

    def run(self) -> None:
        """Until the trainer has finished.

        Raises:
            BackendError: trainer or server ended by themselves too often; their last words are in the message.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "done.json").is_file():
            return
        events = read_lines(self.folder / EVENTS)
        for victim in ("trainer", "server"):
            self._started[victim] = sum(e["event"] == "start" and e["who"] == victim for e in events)
        kills = draw_kills(self.config)[sum(e["event"] == "kill" for e in events) :]
        port = free_port()
        self._address = f"127.0.0.1:{port}"
        budget = self.config.teacher_token_budget
        self._yaml = write_config(self.folder / "teachers.yaml", self.models, port, token_budget=budget)
        due = 0.0
        try:
            self._start("server")
            self._start("trainer")
            while not (self.folder / "done.json").is_file():
                time.sleep(_POLL_S)
                self._read()
                self._revive()
                if kills and self._newest > kills[0].batch:
                    due = due or time.monotonic() + kills[0].share * self._batch_seconds()
                    if time.monotonic() >= due:
                        self._kill(kills.pop(0).victim)
                        due = 0.0
            self._read()
            self._processes["trainer"].wait(60)
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()

    # -- processes ----------------------------------------------------------------------------------------------------

    def _start(self, who: str) -> None:
        life = self._started[who]
        if who == "server":
            command = [sys.executable, "-c", _SERVER, "--log-level", "warning", str(self._yaml)]
        else:
            job = Job(self.config, self.folder, self.models / "student", self._address, life)
            path = self.folder / "job.json"
            path.write_text(job.to_json())
            command = [sys.executable, "-m", "rollout_wal.trainers.mopd.student", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (self.folder / f"{who}.log").open("ab") as log:
            self._processes[who] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        self._started[who] = life + 1
        self._event("start", who)

    def _kill(self, who: str) -> None:
        self._event("kill", who)
        self._processes[who].kill()

    def _revive(self) -> None:
        for who, process in list(self._processes.items()):
            if process.poll() is None or (self.folder / "done.json").is_file():
                continue
            if process.returncode != -signal.SIGKILL:
                self._failures += 1
                self._event("failed", who)
                if self._failures >= _FAILURES:
                    last = (self.folder / f"{who}.log").read_bytes()[-2000:].decode(errors="replace")
                    raise BackendError(
                        problem(
                            f"the {who} ended by itself with {process.returncode}, {self._failures} times; it last "
                            f"said:\n{last}",
                            consequence="The run stopped; started again, it goes on",
                            remedy=f"See {self.folder / f'{who}.log'}",
                        )
                    )
            self._start(who)

    # -- looking ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Whole lines that were added to the metrics since."""
        path = self.folder / METRICS
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._metrics_at)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._metrics_at += len(raw)
                line = json.loads(raw)
                if self._last_time and line["life"] == self._started["trainer"] - 1:
                    self._durations.append(line["time"] - self._last_time)
                self._last_time = line["time"]
                self._newest = max(self._newest, line["batch"])
                self._on_batch(line)

    def _batch_seconds(self) -> float:
        recent = sorted(self._durations[-9:])
        return recent[len(recent) // 2] if recent else 1.0

    def _event(self, event: str, who: str) -> None:
        with (self.folder / EVENTS).open("a") as file:
            file.write(json.dumps({"event": event, "who": who, "time": time.time(), "batch": self._newest}) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; empty if there is none. A last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
