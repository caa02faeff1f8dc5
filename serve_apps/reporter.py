"""The way of counts to Prometheus: through Ray's metrics."""

from __future__ import annotations

from collections.abc import Iterable

from ray.util import metrics as ray_metrics

from lib.serving.record import Increment
from lib.watch import metrics


class Reporter:
    """Hands counts to Ray's metrics, which Prometheus reads."""

    def __init__(self) -> None:
        self._counters = {
            metric.name: ray_metrics.Counter(metric.name, metric.description, metric.labels)
            for metric in metrics.COUNTERS
        }

    def report(self, increments: Iterable[Increment]) -> None:
        """Add to the counters."""
        for metric, labels, value in increments:
            if value > 0:
                tags = dict(zip(metric.labels, labels, strict=True))
                self._counters[metric.name].inc(value, tags)
