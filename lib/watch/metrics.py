"""Every metric that Rayline gives to Ray, by name, once. Ray exports them with `ray_` in front."""

from __future__ import annotations

import math
from dataclasses import dataclass

LATENCY_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, math.inf,
)  # fmt: skip
"""Upper bounds, as of a Prometheus histogram."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name, its labels, and what it says."""

    name: str
    labels: tuple[str, ...]
    description: str


REQUESTS = Metric(
    "rayline_requests",
    ("model", "version", "caller", "status"),
    "Requests answered; caller is the name of the API key.",
)
LATENCY_BUCKET = Metric(
    "rayline_request_latency_seconds_bucket",
    ("model", "version", "le"),
    "Requests answered within le seconds, from their first byte in the gateway to the answer.",
)
LATENCY_SUM = Metric(
    "rayline_request_latency_seconds_sum", ("model", "version"), "Seconds of all requests."
)
SHADOWED = Metric(
    "rayline_shadow_requests",
    ("model", "version", "result"),
    "Copies of requests, by what became of them: agreed, disagreed, dropped or failed.",
)
LOGGED = Metric(
    "rayline_logged_predictions",
    ("result",),
    "Rows of the prediction log, by what became of them: written, dropped since storage was too "
    "slow or full, or kept without_image for the same reason.",
)
COUNTERS = (REQUESTS, LATENCY_BUCKET, LATENCY_SUM, SHADOWED, LOGGED)


def le(bound_s: float) -> str:
    """Return a bucket's bound as Prometheus writes it."""
    return "+Inf" if math.isinf(bound_s) else f"{bound_s:g}"
