"""Prometheus metrics of a server. Optional: needs rollout-wal[metrics]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rollout_wal.errors import MissingExtra
from rollout_wal.histogram import Histogram

from .server import ScoringServer

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_COUNTERS = {
    "accepted_items": "Items that were taken on, those that wait for an identical one included",
    "coalesced_items": "Items that waited for the computation of an identical one",
    "cached_items": "Items answered from disk",
    "scored_items": "Items computed",
    "scored_tokens": "Tokens read by teachers for them",
    "failed": "Items whose teacher failed",
    "cancelled": "Items whose caller went away",
    "deadline_passed": "Items whose deadline passed before they were computed",
    "cache_skipped": "Scores not kept, because the disk could not follow",
    "stalled_streams": "Streams ended because their client stood still",
    "load_s": "Seconds spent loading teachers",
    "busy_s": "Seconds spent computing",
}
_REFUSED = {
    "overload": "refused_overload",
    "draining": "refused_draining",
    "bad": "refused_bad",
    "token": "refused_token",
}


class ServerMetrics:
    """A collector over one server. Reading it takes no lock and stops nothing."""

    def __init__(self, server: ScoringServer, registry: Any = None) -> None:
        try:
            from prometheus_client import core
        except ImportError:
            raise MissingExtra("prometheus_client", "metrics", "exporting metrics") from None
        self._core: Any = core
        self._server = server
        if registry is not None:
            registry.register(self)

    def collect(self) -> Iterator[Metric]:
        core, server = self._core, self._server
        scheduler = server.scheduler
        counters, residency = scheduler.counters, scheduler.residency
        for name, text in _COUNTERS.items():
            unit = name.replace("_s", "_seconds") if name.endswith("_s") else name
            yield core.CounterMetricFamily(f"scoring_{unit}", text, value=getattr(counters, name))
        refused = core.CounterMetricFamily("scoring_refused", "Items or calls refused", labels=["why"])
        for why, name in _REFUSED.items():
            refused.add_metric([why], getattr(counters, name))
        yield refused
        for name, text, value in (
            ("queued_tokens", "Tokens of accepted items that are not answered", scheduler.queued_tokens),
            ("queued_tokens_limit", "Of these, accepted at most", scheduler.limits.max_queued_tokens),
            ("open_items", "Items accepted and not taken by their client", server.open_items),
            ("open_streams", "Score calls", server.open_streams),
            ("result_bytes", "Of results computed or not taken yet, at most", server.result_bytes),
            ("resident_bytes", "Weights of teachers in memory", residency.used_bytes),
            ("memory_bytes", "For the weights of teachers", residency.memory_bytes),
            ("healthy", "0: the scheduler has failed or a unit of work hangs", float(scheduler.healthy())),
            ("draining", "1: nothing is accepted any more", float(server.draining)),
        ):
            yield core.GaugeMetricFamily(f"scoring_{name}", text, value=value)
        failures, loading, room = scheduler.failures, scheduler.room.loading, set(scheduler.room.teachers)
        waiting = scheduler.waiting()
        families = {
            "resident": core.GaugeMetricFamily("scoring_teacher_resident", "1: in memory", labels=["teacher"]),
            "loading": core.GaugeMetricFamily("scoring_teacher_loading", "1: being loaded", labels=["teacher"]),
            "failing": core.GaugeMetricFamily("scoring_teacher_failing", "1: cannot be loaded", labels=["teacher"]),
            "queued": core.GaugeMetricFamily("scoring_teacher_queued_tokens", "Waiting", labels=["teacher"]),
            "loads": core.CounterMetricFamily("scoring_teacher_loads", "Loads", labels=["teacher"]),
            "failures": core.CounterMetricFamily("scoring_teacher_load_failures", "Failed", labels=["teacher"]),
            "evictions": core.CounterMetricFamily("scoring_teacher_evictions", "Evictions", labels=["teacher"]),
        }
        for teacher in scheduler.sources:
            values = {
                "resident": teacher in room,
                "loading": teacher == loading,
                "failing": teacher in failures,
                "queued": waiting[teacher].tokens if teacher in waiting else 0,
                "loads": counters.loads.get(teacher, 0),
                "failures": counters.load_failures.get(teacher, 0),
                "evictions": counters.evictions.get(teacher, 0),
            }
            for name, number in values.items():
                families[name].add_metric([teacher], float(number))
        yield from families.values()
        yield self._histogram("waited", "From acceptance to the work on an item", counters.waited_s)
        yield self._histogram("answered", "From acceptance to the result of an item", counters.answered_s)

    def _histogram(self, name: str, text: str, values: Histogram) -> Any:
        return self._core.HistogramMetricFamily(
            f"scoring_{name}_seconds", text, buckets=values.buckets(), sum_value=values.total
        )


def expose(server: ScoringServer, address: str, port: int) -> Any:
    """Serve the metrics over HTTP; returns the HTTP server, whose `server_port` is the port.

    Raises:
        OSError: the address is not free.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise MissingExtra("prometheus_client", "metrics", "exporting metrics") from None
    registry = CollectorRegistry()
    ServerMetrics(server, registry)
    http, _ = start_http_server(port, address, registry)
    return http
