"""The way of current values to Prometheus: through Ray's metrics, from the job that knows them."""

from __future__ import annotations

from ray.util import metrics as ray_metrics

from lib.watch.metrics import Metric


class Gauges:
    """Hands current values to Ray's metrics, which Prometheus reads.

    Ray must be initialised. Ray exports a value within ten seconds, and drops it some twenty
    seconds after the process that reported it has ended.
    """

    def __init__(self) -> None:
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._states: dict[tuple[str, tuple[str, ...]], set[str]] = {}

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Report a value; the labels in the metric's order."""
        if not metric.is_gauge:
            raise ValueError(f"{metric.name} is a counter")
        gauge = self._gauges.get(metric.name)
        if gauge is None:
            gauge = ray_metrics.Gauge(metric.name, metric.description, metric.labels)
            self._gauges[metric.name] = gauge
        gauge.set(value, dict(zip(metric.labels, labels, strict=True)))

    def set_state(self, metric: Metric, state: str, *labels: str) -> None:
        """Report which state something is in, where the metric's last label is the state."""
        known = self._states.setdefault((metric.name, labels), set())
        known.add(state)
        for other in sorted(known):
            self.set(metric, float(other == state), *labels, other)
