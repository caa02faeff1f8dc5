"""What Prometheus gets of the states that monitor and rollout write. Pure.

with Gauges() as gauges:
    …
    gauges.update(of_monitor(state), instead_of=MONITOR)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lib.watch import metrics
from lib.watch.metrics import Metric

Values = dict[tuple[Metric, tuple[str, ...]], float]

MONITOR = (
    metrics.DRIFT_SCORE,
    metrics.DRIFT_P_VALUE,
    metrics.DRIFT_ALARM,
    metrics.ACCURACY,
    metrics.ACCURACY_LOW,
    metrics.ACCURACY_HIGH,
    metrics.ACCURACY_EXPECTED,
    metrics.LABELLED_ROWS,
    metrics.CONFIDENCE,
    metrics.ENTROPY,
    metrics.DISAGREEMENT,
    metrics.PREDICTED_SHARE,
)
ROLLOUT = (
    metrics.ROLLOUT_STATE,
    metrics.ROLLOUT_WEIGHT,
    metrics.ROLLOUT_SAMPLES,
    metrics.ROLLOUT_GATE,
)
_OF_VERSION = {
    metrics.CONFIDENCE: "confidence",
    metrics.ENTROPY: "entropy",
    metrics.DISAGREEMENT: "disagreement",
}
_OF_LABELLED = {
    metrics.ACCURACY: "accuracy",
    metrics.ACCURACY_LOW: "low",
    metrics.ACCURACY_HIGH: "high",
}
_GATE = {"pass": 1.0, "wait": 0.0, "breach": -1.0}


def of_monitor(state: Mapping[str, Any]) -> Values:
    """Return the values of `watch/MODEL/state.json`; what it does not say is left out."""
    model = state["model"]
    values: Values = {}
    drift = state.get("drift") or {}
    if "alarm" in drift:
        values[metrics.DRIFT_ALARM, (model,)] = float(drift["alarm"])
    for kind, found in (drift.get("kinds") or {}).items():
        values |= _known(metrics.DRIFT_SCORE, (model, kind), found.get("score"))
        values |= _known(metrics.DRIFT_P_VALUE, (model, kind), found.get("p_value"))
    versions: Mapping[str, Mapping[str, Any]] = state.get("versions") or {}
    for version, found in versions.items():
        for metric, name in _OF_VERSION.items():
            values |= _known(metric, (model, version), found.get(name))
        if found.get("labels"):
            for metric, name in _OF_LABELLED.items():
                values |= _known(metric, (model, version), found.get(name))
        values |= _known(metrics.LABELLED_ROWS, (model, version), found.get("labels"))
    if "champion" in state:
        of_champion = (model, str(state["champion"]))
        values |= _known(metrics.ACCURACY_EXPECTED, of_champion, state.get("test_accuracy"))
    champion = versions.get(str(state.get("champion")), {})
    shares = champion.get("class_shares") or ()
    for label, share in zip(state.get("class_names") or (), shares, strict=False):
        values |= _known(metrics.PREDICTED_SHARE, (model, str(label)), share)
    return values


def of_rollout(state: Mapping[str, Any]) -> Values:
    """Return the values of `rollouts/MODEL/state.json`; no state that it is not in."""
    key = (state["model"], str(state["candidate"]))
    values: Values = {
        (metrics.ROLLOUT_STATE, (*key, state["status"])): 1.0,
        (metrics.ROLLOUT_WEIGHT, key): float(state["weight"]),
    }
    gates = state.get("gates") or ()
    for gate in gates:
        values[metrics.ROLLOUT_GATE, (*key, gate["name"])] = _GATE[gate["verdict"]]
    if gates:
        values[metrics.ROLLOUT_SAMPLES, key] = float(max(gate["samples"] for gate in gates))
    return values


def _known(metric: Metric, labels: tuple[str, ...], value: float | None) -> Values:
    if value is None or not math.isfinite(value):
        return {}
    return {(metric, labels): float(value)}
