"""Where this package takes hold of SGLang: this is what fails when an upgrade moves a hook."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from rollout_wal.engines.common.support import Hook
from rollout_wal.engines.sglang import versions
from rollout_wal.errors import BadInput, UnsupportedEngine


def every_hook() -> list[Hook]:
    from rollout_wal.engines.sglang import hooks, plugin, scheduler

    wraps = [wrap.hook for wrap in (*hooks.SAMPLING, *plugin.WRAPS)]
    return [*wraps, *scheduler.RELIED_ON, *plugin.RELIED_ON]


def test_every_hook_is_where_it_was() -> None:
    assert len(every_hook()) > 20
    assert [fault for hook in every_hook() if (fault := hook.fault())] == []


def test_the_installed_version_is_supported_and_others_are_refused(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    from rollout_wal.engines.sglang.engine import SglangEngine

    versions.check()
    for found in ("0.5.22.post1", "0.5.24", "0.6.0"):
        monkeypatch.setattr(versions, "installed", lambda found=found: found)
        with pytest.raises(UnsupportedEngine, match=rf"{found} is installed.*>=0.5.23,<0.5.24"):
            SglangEngine.from_folder(model)


@pytest.mark.parametrize(
    "change", [{"speculative_algorithm": "EAGLE"}, {"tp_size": 2}, {"disable_overlap_schedule": False}]
)
def test_arguments_that_change_what_is_drawn_are_refused(model: Any, change: dict[str, Any]) -> None:
    from rollout_wal.engines.sglang.engine import SglangEngine

    with pytest.raises(BadInput, match=f"server_args has {next(iter(change))}="):
        SglangEngine.from_folder(model, server_args=change)


_PROCESS = """
import os, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.managers.scheduler import Scheduler
load = lambda: load_plugins()
{act}
print("hooks", sum(map(len, HookRegistry._hooks.values())), flush=True)
"""
_CASES = {
    "inert": ("load()", "hooks 0", 0),
    "in force": ("os.environ['ROLLOUT_WAL_SGLANG_LOG'] = '/nonexistent'; load()", "hooks 1", 0),
    "gone": (
        "os.environ['ROLLOUT_WAL_SGLANG_LOG'] = '/nonexistent'; del Scheduler.ingest_requests; load()",
        "Scheduler.ingest_requests is gone",
        1,
    ),
    "not applied": (
        "os.environ['ROLLOUT_WAL_SGLANG_LOG'] = '/nonexistent'; "
        "HookRegistry._patched.add('sglang.srt.managers.schedule_batch.Req.update_finish_state'); load()",
        "has not applied the hooks",
        1,
    ),
}


def test_start_up_asserts_that_the_hooks_are_in_force() -> None:
    """In processes of their own, at once: each takes seconds to import SGLang."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROCESS.format(act=act)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, (act, _, _) in _CASES.items()
    }
    for name, process in running.items():
        out, _ = process.communicate(timeout=120)
        _, words, status = _CASES[name]
        assert words in out, (name, out)
        assert process.returncode == status, name
