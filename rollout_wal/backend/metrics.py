"""Prometheus metrics of a backend. Optional: needs rollout-wal[metrics].

expose(backend, "127.0.0.1", 9464)                        # over HTTP
BackendMetrics(backend, prometheus_client.REGISTRY)       # into a registry that is exported already
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra
from ..log.report import WriterNumbers
from ..metrics import WriterMetrics
from .backend import RolloutBackend
from .coordinator import Coordinator
from .pool import WorkerState

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_COUNTERS = {
    "tokens": "Output tokens that became durable; its rate is tokens/s",
    "finished": "Rollouts handed over for the first time, censored ones included",
    "deaths": "Deaths of workers",
    "interruptions": "Rollouts whose worker died under them, once for each death",
    "tokens_prefilled": "Output tokens that a resume computed again",
    "tokens_loaded": "Output tokens whose KV was loaded instead",
    "snapshots": "Times that a rollout's KV became durable",
    "turns": "Turns that tools have answered",
    "tool_calls": "Calls that tools were given, repeated ones included",
    "seconds_resuming": "From each death to the moment its rollouts were running again, summed over rollouts",
    "seconds_loading": "Reading KV snapshots, summed over rollouts",
}
_GAUGES = {
    "in_flight": "Rollouts that workers run",
    "waiting": "Rollouts that wait for a worker",
    "calling": "Rollouts that wait for their tools",
    "workers_ready": "Workers that take rollouts",
}


class BackendMetrics:
    """A collector over one backend. Reading it takes no lock, stops nothing, and works while the backend starts, runs,
    has failed or is closed.

    Args:
        registry: a prometheus_client registry to register with.

    Raises:
        MissingExtra: prometheus_client is not installed.
    """

    def __init__(self, backend: RolloutBackend, registry: Any = None) -> None:
        try:
            from prometheus_client import core
        except ImportError:
            raise MissingExtra("prometheus_client", "metrics", "exporting metrics") from None
        self._core: Any = core
        self._backend = backend
        if registry is not None:
            registry.register(self)

    def describe(self) -> list[Metric]:
        """Nothing: a registry must not ask a backend that has not started."""
        return []

    def collect(self) -> Iterator[Metric]:
        c = self._backend.coordinator
        running = c is not None and c.is_alive() and c.error is None
        yield self._core.GaugeMetricFamily(
            "rollout_wal_running", "0: the backend is closed, or has stopped with an error", value=float(running)
        )
        if c is None:
            return
        yield from WriterMetrics(_writers(c)).collect()
        yield from self._numbers(c)
        yield from self._labelled(c)
        yield from self._workers(c)

    def _numbers(self, c: Coordinator) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            metric = name.removeprefix("seconds_") + "_seconds" if name.startswith("seconds_") else name
            yield self._core.CounterMetricFamily(f"rollout_wal_{metric}", text, value=getattr(c.stats, name))
        for name, text in _GAUGES.items():
            yield self._core.GaugeMetricFamily(f"rollout_wal_{name}", text, value=getattr(c.stats, name))
        if (policy := c.wal.state.policy) is not None:
            yield self._core.GaugeMetricFamily(
                "rollout_wal_policy_version", "Policy version in force", value=policy.version
            )

    def _labelled(self, c: Coordinator) -> Iterator[Metric]:
        for name, label, text, counts in (
            ("resumes", "by", "Attempts that went on after a death, by what their tokens' KV came from", c.stats.by),
            ("kv_fallbacks", "reason", "Resumes that could not load all they had", c.stats.kv_fallbacks),
            ("censored", "reason", "Rollouts that ended without finishing; poison is one reason", c.stats.censored),
        ):
            family = self._core.CounterMetricFamily(f"rollout_wal_{name}", text, labels=[label])
            for value, count in dict(counts).items():  # a copy: the coordinator goes on counting
                family.add_metric([value], count)
            yield family

    def _workers(self, c: Coordinator) -> Iterator[Metric]:
        alive = self._core.GaugeMetricFamily("rollout_wal_worker_alive", "1: it takes rollouts", labels=["worker"])
        restarts = self._core.CounterMetricFamily(
            "rollout_wal_worker_restarts", "Processes that it had before the one it has", labels=["worker"]
        )
        for worker in c.fleet.workers:
            alive.add_metric([worker.name], float(worker.state is WorkerState.READY))
            restarts.add_metric([worker.name], max(0, worker.starts - 1))
        yield alive
        yield restarts


def _writers(c: Coordinator) -> dict[str, WriterNumbers]:
    """The job log, which is of this process, and the engine logs, as their workers tell of them."""
    return {"job": c.wal.log.writer, **{f"engines/{w.name}": w.writer for w in c.fleet.workers}}


def expose(backend: RolloutBackend, address: str, port: int) -> Any:
    """Serve the metrics over HTTP; returns the HTTP server, whose `server_port` is the port, and whose `shutdown` ends
    it.

    Raises:
        MissingExtra: prometheus_client is not installed. OSError: the address is not free.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise MissingExtra("prometheus_client", "metrics", "exporting metrics") from None
    registry = CollectorRegistry()
    BackendMetrics(backend, registry)
    http, _ = start_http_server(port, address, registry)
    return http
