"""What a real registry says of a real backend: before, while and after it runs, and through the death of a worker."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry

from rollout_wal.backend import RolloutBackend
from rollout_wal.backend.metrics import BackendMetrics, expose
from rollout_wal.errors import MissingExtra
from rollout_wal.params import SamplingParams


def test_a_killed_worker_and_what_became_of_its_rollouts(
    backend: Callable[..., RolloutBackend], prompts: Any, until: Callable[..., None]
) -> None:
    b = backend(first_version=4)
    registry = CollectorRegistry()
    BackendMetrics(b, registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"rollout_wal_{name}", labels)

    assert value("running") == 0.0
    assert value("tokens_total") is None
    with b:
        assert value("running") == 1.0
        iterator = b.generate(prompts, SamplingParams(max_tokens=600, ignore_eos=True), cohort="c")
        until(lambda: b.stats.tokens > 400)
        until(lambda: (value("in_flight") or 0) == 8)
        (given_up,) = b.in_flight("c")[:1]
        b.abort(given_up, reason="deadline: 3 s")
        steps = {name: s for name, (_, s) in b.worker_steps().items()}
        b.kill_worker(max(steps, key=lambda name: steps[name]))
        until(lambda: b.stats.deaths == 1)
        rollouts = list(iterator)
        until(lambda: value("workers_ready") == 2.0)
        interrupted = sum(r.interruptions for r in rollouts)
        assert interrupted > 0
        assert value("deaths_total") == 1.0
        assert value("interruptions_total") == interrupted
        assert value("resumes_total", by="prefill") == interrupted
        assert value("resumes_total", by="kv") is None
        assert value("tokens_prefilled_total") == b.stats.tokens_prefilled > 0
        assert value("finished_total") == 8.0
        assert value("censored_total", reason="deadline") == 1.0
        assert value("in_flight") == value("waiting") == 0.0
        assert value("policy_version") == 4.0
        assert sum(value("worker_alive", worker=w) or 0 for w in "01") == 2.0
        assert sum(value("worker_restarts_total", worker=w) or 0 for w in "01") == 1.0
        # Counted as they were told of: what a death cut off is read back from the log, and sampled by nobody again.
        assert 0 < (value("tokens_total") or 0) <= sum(len(r.output) for r in rollouts)
        for log in ("job", "engines/0", "engines/1"):
            syncs = value("syncs_total", log=log)
            assert syncs
            assert value("sync_seconds_count", log=log) == value("sync_seconds_bucket", log=log, le="+Inf") == syncs
            assert (value("sync_seconds_sum", log=log) or 0) > 0
            assert (value("durable_lsn", log=log) or 0) > 0
            assert (value("written_bytes_total", log=log) or 0) > 0
            assert value("poisoned", log=log) == 0.0
        http = expose(b, "127.0.0.1", 0)
        try:
            with urlopen(f"http://127.0.0.1:{http.server_port}/metrics") as answer:
                assert "rollout_wal_sync_seconds_bucket" in answer.read().decode()
        finally:
            http.shutdown()
            http.server_close()
    assert value("running") == 0.0


def test_without_the_extra_it_says_what_to_install(
    backend: Callable[..., RolloutBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for what in (lambda: BackendMetrics(backend()), lambda: expose(backend(), "127.0.0.1", 0)):
        with pytest.raises(MissingExtra, match=r"pip install 'rollout-wal\[metrics\]'"):
            what()
