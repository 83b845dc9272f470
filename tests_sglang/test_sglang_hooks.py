"""Where this package takes hold of SGLang: this is what fails when an upgrade moves a hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout_wal.engines.common.support import Hook
from rollout_wal.engines.sglang import versions
from rollout_wal.errors import BadInput, UnsupportedEngine


def every_hook() -> list[Hook]:
    from rollout_wal.engines.sglang import scheduler, server_hooks

    wraps = [wrap.hook for wrap in server_hooks.WRAPS]
    return [*wraps, *scheduler.RELIED_ON, *server_hooks.RELIED_ON]


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
    "change",
    [
        {"speculative_algorithm": "EAGLE"},
        {"enable_mixed_chunk": True},
        {"dllm_algorithm": "LowConfidence"},
        {"tp_size": 2},
        {"disable_overlap_schedule": False},
    ],
)
def test_arguments_that_change_what_is_drawn_are_refused(model: Any, change: dict[str, Any]) -> None:
    from rollout_wal.engines.sglang.engine import SglangEngine

    with pytest.raises(BadInput, match=f"server_args has {next(iter(change))}="):
        SglangEngine.from_folder(model, server_args=change)


_CONFIGURED = "os.environ['ROLLOUT_WAL_SGLANG_LOG'] = '/nonexistent'; "
_CASES = {
    "inert": ("pass", "hooks 0", 0),
    "in force": (_CONFIGURED, "hooks 1", 0),
    "gone": (_CONFIGURED + "del Scheduler.ingest_requests", "Scheduler.ingest_requests is gone", 1),
    "other parameters": (
        _CONFIGURED + "Scheduler.pause_generation = lambda self, how: None",
        r"Scheduler.pause_generation takes (self, how) instead of (self, recv_req, ...)",
        1,
    ),
    "import fails": (
        _CONFIGURED + "sys.modules['rollout_wal.engines.sglang.server_log'] = None",
        "rollout-wal could not be loaded: ModuleNotFoundError",
        1,
    ),
    "import fails, no log": ("sys.modules['rollout_wal.engines.sglang.server_log'] = None", "hooks 0", 0),
    "bad option": (
        _CONFIGURED + "os.environ['ROLLOUT_WAL_SGLANG_POLICY_VERSION'] = 'v1'",
        "ROLLOUT_WAL_SGLANG_POLICY_VERSION='v1' is not a number",
        1,
    ),
    # SGLang's own whitelist: nothing of this package runs, so that only the absence of its words tells.
    "not in the whitelist": (_CONFIGURED + "os.environ['SGLANG_PLUGINS'] = 'another'", "hooks 0", 0),
    "not applied": (
        _CONFIGURED + "HookRegistry._patched.add('sglang.srt.managers.schedule_batch.Req.update_finish_state')",
        "has not applied the hooks",
        1,
    ),
}


def test_start_up_asserts_that_the_hooks_are_in_force(nursery: Any, tmp_path: Path) -> None:
    """A process that was to log and cannot be hooked ends; one that was not to log is left alone."""
    import serve

    running = {}
    for name, (act, _, _) in _CASES.items():
        running[name] = nursery.Process(target=serve.load, args=(tmp_path / name, act))
        running[name].start()
    for name, process in running.items():
        process.join(120)
        _, words, status = _CASES[name]
        assert words in (tmp_path / name).read_text(), name
        assert process.exitcode == status, name
