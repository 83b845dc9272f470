"""A scoring server in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_CODE = "from scoring.serve_command import serve_teachers; serve_teachers()"


class ServerProcess:
    """`rollout-wal serve-teachers`; use as a context manager. `target` is its address.

    Args:
        config: where to write the configuration (JSON is YAML).
        settings: what to write there.
    """

    def __init__(self, config: Path, settings: dict[str, Any]) -> None:
        self._port_file = config.with_suffix(".port")
        config.write_text(json.dumps({"listen": "127.0.0.1:0", **settings}), encoding="utf-8")
        self._log = config.with_suffix(".log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, "--port-file", str(self._port_file), "--log-level", "warning", str(config)],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.target = ""

    def __enter__(self) -> ServerProcess:
        while not self._port_file.exists():
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the server ended; see {self._log.name}: {Path(self._log.name).read_text()[-2000:]}"
                )
            time.sleep(0.05)
        self.target = f"127.0.0.1:{int(self._port_file.read_text())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
