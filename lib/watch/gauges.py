"""The way of current values to Prometheus: through Ray's metrics, from the job that knows them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import ray
from ray.util import metrics as ray_metrics

from lib.watch.metrics import Metric

Values = Mapping[tuple[Metric, tuple[str, ...]], float]
"""Metric and its labels, in the metric's order → value."""
_AGAIN_EVERY_S = 4.0
"""Ray forgets a value once it was exported, every ten seconds: so each is reported again."""


_log = logging.getLogger(__name__)


def connect() -> Gauges | None:
    """Join the Ray that runs here to report through it; None, said once, where there is none."""
    try:
        # "auto": without it, one would be started.
        ray.init(
            address="auto",
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        _log.warning("no Ray to report metrics through: %s", error)
        return None
    return Gauges()


class Gauges:
    """Hands current values to Ray's metrics, again and again until it is closed.

    Ray must be initialised. A value is seen within ten seconds, and is gone some twenty seconds
    after this was closed or its process ended.
    """

    def __init__(self, *, again_every_s: float = _AGAIN_EVERY_S) -> None:
        self._again_every_s = again_every_s
        self._values: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Report a value from now on; the labels in the metric's order."""
        self.update({(metric, labels): value})

    def update(self, values: Values, *, instead_of: Iterable[Metric] = ()) -> None:
        """Report values from now on, and no others of the metrics `instead_of`."""
        for metric, labels in values:
            if not metric.is_gauge:
                raise ValueError(f"{metric.name} is a counter")
            if len(labels) != len(metric.labels):
                raise ValueError(f"{metric.name} has the labels {metric.labels}, not {labels}")
        gone = set(instead_of)
        with self._lock:
            kept = {key: value for key, value in self._values.items() if key[0] not in gone}
            self._values = {**kept, **values}
            self._report(values)
            if self._thread is None:
                self._thread = threading.Thread(target=self._repeat, daemon=True)
                self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is reported any more."""
        return self._closed.is_set() and not (self._thread and self._thread.is_alive())

    def close(self) -> None:
        """Report nothing any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        """Return it, to be closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _repeat(self) -> None:
        while not self._closed.wait(self._again_every_s):
            with self._lock:
                self._report(self._values)

    def _report(self, values: Values) -> None:
        for (metric, labels), value in values.items():
            gauge = self._gauges.get(metric.name)
            if gauge is None:
                gauge = ray_metrics.Gauge(metric.name, metric.description, metric.labels)
                self._gauges[metric.name] = gauge
            gauge.set(value, dict(zip(metric.labels, labels, strict=True)))
