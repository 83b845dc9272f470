"""Prometheus metrics of a pipeline. Optional: needs rollout-wal[metrics]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rollout_wal.errors import MissingExtra

if TYPE_CHECKING:
    from .pipeline import Pipeline

_COUNTERS = {
    "begun": "Rollouts submitted to the engine",
    "sealed": "Rollouts sealed into the dataset",
    "consumed": "Rollouts consumed by the learner",
    "stale": "Rollouts dropped because their first token was too old",
    "censored": "Rollouts left out because they did not end",
    "unscorable": "Rollouts left out because no teacher could score them",
    "sampled_tokens": "Tokens sampled, of sealed rollouts",
    "scored_tokens": "Sampled tokens with a teacher's score",
}


class PipelineMetrics:
    """A collector: what is in each buffer beside its bound, how long the oldest waits, and how much is covered.

    Args:
        registry: a prometheus_client registry to register with.
    """

    def __init__(self, pipeline: Pipeline, *, registry: Any = None) -> None:
        try:
            from prometheus_client import core
        except ImportError:
            raise MissingExtra("prometheus_client", "metrics", "exporting metrics") from None
        self._core, self._pipeline = core, pipeline
        if registry is not None:
            registry.register(self)

    def describe(self) -> list[Any]:
        """Nothing: a registry must not ask a pipeline that has not started."""
        return []

    def collect(self) -> Iterator[Any]:
        stats, options = self._pipeline.stats(), self._pipeline.options
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        held = gauge("rollout_wal_pipeline_rollouts", "Rollouts in a stage", labels=["stage"])
        for stage in ("generating", "finished", "queued", "scoring", "scored"):
            held.add_metric([stage], getattr(stats, stage))
        bound = gauge("rollout_wal_pipeline_bound", "Rollouts that a buffer may hold", labels=["buffer"])
        for buffer in ("generation", "scoring", "scored"):
            bound.add_metric([buffer], getattr(options, buffer))
        age = gauge("rollout_wal_pipeline_oldest_seconds", "Wait of the oldest rollout in a queue", labels=["queue"])
        age.add_metric(["scoring"], stats.oldest_queued_s)
        age.add_metric(["scored"], stats.oldest_scored_s)
        yield from (held, bound, age)
        if (coverage := stats.score_coverage) is not None:
            yield gauge("rollout_wal_pipeline_score_coverage", "Scored tokens of all sampled ones", value=coverage)
        yield counter(
            "rollout_wal_pipeline_held_back_seconds", "Time without room for new prompts", value=stats.held_back_s
        )
        for name, text in _COUNTERS.items():
            yield counter(f"rollout_wal_pipeline_{name}", text, value=getattr(stats, name))
