"""Every metric that Rayline gives to Ray, by name, once.

Counters are reported by the gateways; gauges by the jobs that know, for as long as they run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LATENCY_BUCKETS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, math.inf,
)  # fmt: skip
"""Upper bounds, as of a Prometheus histogram."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name, its labels, and what it says."""

    name: str
    labels: tuple[str, ...]
    description: str
    is_gauge: bool = False
    """Whether it goes up and down; else it is a counter."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus, as Ray exports it."""
        return f"ray_{self.name}" if self.is_gauge else f"ray_{self.name}_total"


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
    "Rows of the prediction log: accepted, and of these written, dropped since storage was too "
    "slow or full, or kept without_image for the same reason. Those that are neither written nor "
    "dropped wait, or were lost with a gateway.",
)
COUNTERS = (REQUESTS, LATENCY_BUCKET, LATENCY_SUM, SHADOWED, LOGGED)


def _gauge(name: str, labels: tuple[str, ...], description: str) -> Metric:
    return Metric(f"rayline_{name}", labels, description, is_gauge=True)


SWEEP_TRIALS = _gauge(
    "sweep_trials", ("sweep", "state"), "Trials of a sweep by state: running, done or failed."
)
SWEEP_BEST = _gauge(
    "sweep_best", ("sweep", "metric"), "Best value of the sweep's first objective so far."
)
SWEEP_IMAGES_PER_S = _gauge(
    "sweep_images_per_second", ("sweep",), "Images trained on per second, by all running trials."
)
DRIFT_SCORE = _gauge(
    "drift_score",
    ("model", "kind"),
    "How far the last window is from the reference; kind is inputs or predictions.",
)
DRIFT_P_VALUE = _gauge(
    "drift_p_value",
    ("model", "kind"),
    "Smallest p-value of the last window, corrected for the number of tests.",
)
DRIFT_ALARM = _gauge("drift_alarm", ("model",), "1 while the monitor says drift, else 0.")
ACCURACY = _gauge(
    "accuracy", ("model", "version"), "Share of right answers among the labelled, in the window."
)
ACCURACY_LOW = _gauge(
    "accuracy_low", ("model", "version"), "Lower end of the accuracy's 95 % interval."
)
ACCURACY_HIGH = _gauge(
    "accuracy_high", ("model", "version"), "Upper end of the accuracy's 95 % interval."
)
ACCURACY_EXPECTED = _gauge(
    "accuracy_expected", ("model", "version"), "Accuracy on the test set, at registration."
)
LABELLED_ROWS = _gauge(
    "labelled_rows", ("model", "version"), "Answers with a true label, in the window."
)
CONFIDENCE = _gauge(
    "mean_confidence", ("model", "version"), "Mean probability of the label that was given."
)
ENTROPY = _gauge("mean_entropy", ("model", "version"), "Mean entropy of the answers, in nats.")
DISAGREEMENT = _gauge(
    "disagreement", ("model", "version"), "Share of a shadow's answers unlike the champion's."
)
PREDICTED_SHARE = _gauge(
    "predicted_share", ("model", "label"), "Share of answers with this label, in the window."
)
ROLLOUT_STATE = _gauge(
    "rollout_state",
    ("model", "version", "state"),
    "1 for the state that a rollout is in; there is no series for the others.",
)
ROLLOUT_WEIGHT = _gauge(
    "rollout_weight_percent", ("model", "version"), "Share of traffic of the current step."
)
ROLLOUT_SAMPLES = _gauge(
    "rollout_samples", ("model", "version"), "Requests that the current step has seen."
)
ROLLOUT_GATE = _gauge(
    "rollout_gate",
    ("model", "version", "gate"),
    "What a gate says: 1 passed, 0 not decided yet, -1 breached.",
)
GAUGES = (
    SWEEP_TRIALS,
    SWEEP_BEST,
    SWEEP_IMAGES_PER_S,
    DRIFT_SCORE,
    DRIFT_P_VALUE,
    DRIFT_ALARM,
    ACCURACY,
    ACCURACY_LOW,
    ACCURACY_HIGH,
    ACCURACY_EXPECTED,
    LABELLED_ROWS,
    CONFIDENCE,
    ENTROPY,
    DISAGREEMENT,
    PREDICTED_SHARE,
    ROLLOUT_STATE,
    ROLLOUT_WEIGHT,
    ROLLOUT_SAMPLES,
    ROLLOUT_GATE,
)


def le(bound_s: float) -> str:
    """Return a bucket's bound as Prometheus writes it."""
    return "+Inf" if math.isinf(bound_s) else f"{bound_s:g}"
