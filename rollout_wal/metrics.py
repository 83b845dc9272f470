"""Prometheus metrics of the logs. Optional: needs rollout-wal[metrics].

`WriterMetrics` watches writers, and `backend.metrics.BackendMetrics` a whole backend with its writers; `exposition`
turns what `rollout-wal stats` collects from outside into Prometheus' text format, for a textfile collector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import MissingExtra

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from .log.report import WriterNumbers


def _core() -> Any:
    try:
        from prometheus_client import core
    except ImportError:
        raise MissingExtra("prometheus_client", "metrics", "exporting metrics") from None
    return core


class WriterMetrics:
    """A collector over the writers of this process. Reading it takes no lock that a commit needs.

    Args:
        writers: label -> writer; a live mapping, read at each scrape.
        counters: name -> value of what else the process counts ("in_flight", "resumed", "recovered"); live too.
    """

    def __init__(
        self,
        writers: Mapping[str, WriterNumbers],
        counters: Mapping[str, float] | None = None,
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._core = _core()
        self._writers = writers
        self._counters = counters if counters is not None else {}
        if registry is not None:
            registry.register(self)

    def collect(self) -> Iterator[Metric]:
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        families = {
            "durable_lsn": gauge("rollout_wal_durable_lsn", "Highest durable LSN", labels=["log"]),
            "lag_records": gauge("rollout_wal_durable_lag_records", "Appended and not durable yet", labels=["log"]),
            "lag_bytes": gauge("rollout_wal_durable_lag_bytes", "Appended and not being synced yet", labels=["log"]),
            "bytes": counter("rollout_wal_written_bytes", "Written to the log", labels=["log"]),
            "syncs": counter("rollout_wal_syncs", "Syncs of the log", labels=["log"]),
            "sync_s": self._core.HistogramMetricFamily("rollout_wal_sync_seconds", "Of one sync", labels=["log"]),
            "poisoned": gauge("rollout_wal_poisoned", "1: the writer accepts nothing more", labels=["log"]),
        }
        for label, writer in self._writers.items():
            families["durable_lsn"].add_metric([label], writer.durable_lsn)
            families["lag_records"].add_metric([label], max(0, writer.last_lsn - writer.durable_lsn))
            families["lag_bytes"].add_metric([label], writer.pending_bytes)
            families["bytes"].add_metric([label], writer.bytes_written)
            families["syncs"].add_metric([label], writer.syncs)
            families["sync_s"].add_metric([label], writer.sync_s.buckets(), writer.sync_s.total)
            families["poisoned"].add_metric([label], float(writer.poisoned is not None))
        yield from families.values()
        for name, value in self._counters.items():
            yield gauge(f"rollout_wal_{name}", f"Rollouts {name.replace('_', ' ')}", value=value)


def exposition(stats: Mapping[str, Any]) -> str:
    """What `rollout-wal stats` collected, in Prometheus' text format."""
    core = _core()
    from prometheus_client import CollectorRegistry, generate_latest

    class Snapshot:
        def collect(self) -> Iterator[Metric]:
            for name, value in stats["job"].items():
                if value is not None:
                    yield core.GaugeMetricFamily(f"rollout_wal_{name}", name.replace("_", " "), value=value)
            for name, text in (
                ("bytes", "Size of the segments"),
                ("durable_lsn", "Highest durable LSN"),
                ("unacknowledged", "Intact records that nothing claims"),
                ("tokens_held", "Tokens of rollouts that are still needed"),
                ("sound", "1: everything that was acknowledged can be read"),
            ):
                family = core.GaugeMetricFamily(f"rollout_wal_log_{name}", text, labels=["log"])
                for log, numbers in stats["logs"].items():
                    family.add_metric([log], float(numbers[name]))
                yield family

    registry = CollectorRegistry()
    registry.register(Snapshot())
    text: str = generate_latest(registry).decode()
    return text
