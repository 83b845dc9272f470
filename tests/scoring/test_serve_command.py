"""`rollout-wal serve-teachers`: its configuration, and the process that it becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from scoring.client import ClientOptions, ScoringClient
from scoring.config import read_config
from scoring.errors import BadConfiguration
from scoring.items import ScoreItem, Scores, Wanted
from scoring.serve_command import serve_teachers

GOOD: dict[str, Any] = {"memory": "1GiB", "teachers": {"a": {"model": "m"}}}


def write(folder: Path, config: Any) -> Path:
    path = folder / "teachers.yaml"
    path.write_text(yaml.safe_dump(config) if not isinstance(config, str) else config)
    return path


def test_a_whole_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("0123456789abcdef\n")
    text = """
listen: "[::1]:0"
tls: {certificate: s.pem, private_key: s.key, client_authorities: c.pem}
tokens_file: tokens
memory: 1.5 GiB
max_wait_s: 10
patience_s: 2.5
threads: 2
cache: scores
cache_bytes: 100MiB
metrics: 127.0.0.1:9464
drain_s: 5
limits: {max_item_tokens: 1000, max_item_result_bytes: 1MiB, linger_s: 0.5}
server: {stream_items: 3, result_bytes: 10MB, reflection: true}
teachers:
  math/7b: {model: models/math, precision: mxfp4, domains: [math, algebra], pinned: true, token_budget: 5}
  self: {model: /abs/student, frozen: true, share_prefixes: false}
"""
    config = read_config(write(tmp_path, text))
    assert config.memory == 3 << 29
    assert (config.max_wait_s, config.patience_s, config.threads, config.drain_s) == (10.0, 2.5, 2, 5.0)
    assert (config.cache, config.cache_bytes, config.metrics) == (tmp_path / "scores", 100 << 20, ("127.0.0.1", 9464))
    assert (config.limits.max_item_tokens, config.limits.max_item_result_bytes, config.limits.linger_s) == (
        1000,
        1 << 20,
        0.5,
    )
    assert (config.server.address, config.server.tokens) == ("[::1]:0", ("0123456789abcdef",))
    assert config.server.client_authorities == tmp_path / "c.pem"
    assert (config.server.stream_items, config.server.result_bytes, config.server.reflection) == (3, 10_000_000, True)
    math, own = config.teachers["math/7b"], config.teachers["self"]
    assert (math.model, math.precision, math.domains) == (tmp_path / "models/math", "mxfp4", ("math", "algebra"))
    assert (math.pinned, math.token_budget, own.frozen, own.share_prefixes) == (True, 5, True, False)
    assert own.model == Path("/abs/student")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory": None}, "memory"),
        ({"memory": "lots"}, "no size"),
        ({"memory": True}, "no size"),
        ({"teachers": {}}, "there is none"),
        ({"teachers": {"a": {}}}, "names no model"),
        ({"teachers": {"a": {"model": "m", "modle": "m"}}}, r"teachers\.a\.modle"),
        ({"teachers": {"../a b": {"model": "m"}}}, "no name"),
        ({"teachers": {"a": {"model": "m", "domains": "math"}}}, "no list"),
        ({"teachers": {"a": {"model": "m", "pinned": 1}}}, "neither true nor false"),
        ({"teachers": {"a": {"model": "m", "domains": ["x"]}, "b": {"model": "m", "domains": ["x"]}}}, "more than one"),
        ({"limits": {"max_item_tokens": -1}}, "whole number"),
        ({"limits": {"maximum": 1}}, r"limits\.maximum"),
        ({"server": {"tokens": ["secret"]}}, r"server\.tokens"),
        ({"tls": {"cert": "x"}}, r"tls\.cert"),
        ({"listen": "nowhere"}, "no address"),
        ({"listen": "0.0.0.0:1"}, "insecure"),
        ({"listen": "example.org:1", "tls": {"certificate": "c", "private_key": "k"}}, "insecure"),
        ({"metrics": "127.0.0.1:99999"}, "no address"),
        ({"tokens_file": "absent"}, "tokens"),
        ({"max_wait_s": "soon"}, "seconds"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(BadConfiguration, match=says):
        read_config(write(tmp_path, config))


@pytest.mark.parametrize("text", ["", "[]", "a: [", "!!python/object/apply:os.system [true]", "\x00"])
def test_what_is_no_configuration_at_all(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration):
        read_config(write(tmp_path, text))


def test_other_machines_only_if_told_so(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, {**GOOD, "listen": "0.0.0.0:1", "insecure": True})).server.address == "0.0.0.0:1"
    assert read_config(write(tmp_path, GOOD)).server.address == "127.0.0.1:50151"


def test_check_tells_what_would_be_served(tiny: Callable[..., Path], tmp_path: Path) -> None:
    good = {**GOOD, "teachers": {"a": {"model": str(tiny()), "precision": "float32"}}}
    done = CliRunner().invoke(serve_teachers, ["--check", str(write(tmp_path, good))])
    assert done.exit_code == 0, done.output
    assert "a\tfloat32\t" in done.output
    done = CliRunner().invoke(serve_teachers, ["--check", str(write(tmp_path, {**good, "memory": "1KiB"}))])
    assert done.exit_code == 1
    assert "does not fit" in done.output


class Process:
    """The command in a process of its own."""

    def __init__(self, config: Path, port: int = 0) -> None:
        self.config, self.port = config, port

    def start(self) -> None:
        settings = yaml.safe_load(self.config.read_text())
        settings["listen"] = f"127.0.0.1:{self.port}"
        self.config.write_text(yaml.safe_dump(settings))
        port_file = self.config.with_suffix(".port")
        port_file.unlink(missing_ok=True)
        self.log = self.config.with_suffix(".log").open("ab")
        code = "from scoring.serve_command import serve_teachers; serve_teachers()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "--port-file", str(port_file), str(self.config)],
            stdout=self.log,
            stderr=self.log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        end = time.monotonic() + 120
        while not port_file.exists():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)
        self.port = int(port_file.read_text())

    def text(self) -> str:
        return self.config.with_suffix(".log").read_text()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.log.close()
        return code


@contextmanager
def process(config: Path) -> Iterator[Process]:
    server = Process(config)
    server.start()
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def make_items(count: int, length: int, teacher: str) -> list[ScoreItem]:
    rng = np.random.default_rng(0)
    return [
        ScoreItem(rng.integers(4, 300, length).astype(np.int32), (8, length), teacher, wanted=Wanted())
        for _ in range(count)
    ]


@pytest.mark.slow
def test_killed_in_mid_stream_nothing_is_lost_or_wrong(
    tiny: Callable[..., Path], check_scores: Any, tmp_path: Path
) -> None:
    """SIGKILL twice while results stream in, then SIGTERM: every item is scored, and right."""
    teachers = {
        f"t{i}": {"model": str(tiny("llama", i)), "precision": "float32", "token_budget": 500} for i in range(2)
    }
    config = write(
        tmp_path,
        {"memory": "600KiB", "cache": "cache", "threads": 1, "limits": {"work_tokens": 3000}, "teachers": teachers},
    )
    items = make_items(60, 200, "t0") + make_items(60, 200, "t1")
    found: dict[int, Any] = {}
    with process(config) as server:
        options = ClientOptions(window=40, attempts=50, backoff_max_s=1.0)
        with ScoringClient([f"127.0.0.1:{server.port}"], options) as client:
            for index, outcome in client.score(items):
                found[index] = outcome
                if len(found) in (20, 70):
                    server.end(signal.SIGKILL)
                    server.start()
            assert len(found) == 120
            again = dict(client.score(items[:50]))
        assert all(isinstance(o, Scores) for o in again.values())
        # Not all: what was answered in the moment of a SIGKILL may not have been on the disk yet.
        assert any(o.from_cache for o in again.values())
        assert server.end(signal.SIGTERM) == 0
    models = [AutoModelForCausalLM.from_pretrained(tiny("llama", i), dtype=torch.float32) for i in range(2)]
    for index, outcome in found.items():
        assert isinstance(outcome, Scores), outcome
        if index % 10 == 0:
            check_scores(models[index // 60], items[index], outcome, 384)
    events = [json.loads(line) for line in server.text().splitlines() if line.startswith("{")]
    assert any(e["event"] == "teacher loaded" and e["teacher"] == "t1" for e in events)
    assert events[-1] == {**events[-1], "event": "server drained", "all_answered": True}
