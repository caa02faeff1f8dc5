"""When Prometheus is to tell someone, as data, and how that becomes a file of rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from lib.watch import metrics
from lib.watch.metrics import Metric

PAGE, TICKET, NOTE = "page", "ticket", "note"
"""Severities: look now, look today, good to know."""

_BY = "by (model, version)"
_NO_MONITOR = "no monitor runs"
_NO_ROLLOUT = "no rollout runs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """One rule: a value that is watched, and the bound that it must not be beyond."""

    name: str
    value: str
    """PromQL."""
    above: float | None = None
    below: float | None = None
    for_s: int
    """For this long, before it is told."""
    severity: str
    summary: str
    """With `{{ $labels.model }}` and `{{ $value }}` as Prometheus fills them in."""
    advice: str
    """What to do."""
    may_be_empty: str = ""
    """When the value is rightly not there; empty if it always is."""

    def __post_init__(self) -> None:
        """Check that there is one bound."""
        if (self.above is None) == (self.below is None):
            raise ValueError(f"alert {self.name}: give one of above={self.above}, {self.below=}")

    @property
    def expr(self) -> str:
        """What is true while there is something to tell."""
        if self.above is not None:
            return f"{self.value} > {self.above:g}"
        return f"{self.value} < {self.below:g}"


def _grown(metric: Metric, by: str, where: str) -> str:
    return f"sum {by} (rate({metric.exported}{{{where}}}[5m]))"


def _max(metric: Metric, where: str = "") -> str:
    return f"max by ({', '.join(metric.labels)}) ({metric.exported}{where})"


_ALL = _grown(metrics.REQUESTS, _BY, 'version!=""')
_FAILED = _grown(metrics.REQUESTS, _BY, 'version!="", status=~"5.."')
_COPIES = _grown(metrics.SHADOWED, _BY, "")
_COPIES_FAILED = _grown(metrics.SHADOWED, _BY, 'result="failed"')
_BUCKETS = _grown(metrics.LATENCY_BUCKET, "by (model, version, le)", 'version!=""')
_STORE = 'sum(ray_resources{Name="object_store_memory"})'
_VERSION = "{{ $labels.model }} version {{ $labels.version }}"

SERVING = (
    Alert(
        name="RaylineNoGateway",
        value='(sum(ray_serve_deployment_replica_healthy{application="gateway"}) or vector(0))',
        below=1,
        for_s=60,
        severity=PAGE,
        summary="No gateway is healthy: nobody gets an answer.",
        advice="Look at the gateway on the Serve page of Ray's dashboard; `make up` brings up "
        "what is missing.",
    ),
    Alert(
        name="RaylineErrors",
        value=f"({_FAILED} or 0 * {_ALL}) / {_ALL}",
        above=0.01,
        for_s=120,
        severity=PAGE,
        summary=f"{_VERSION} fails {{{{ $value | humanizePercentage }}}} of its requests.",
        advice="`python -m jobs.deploy rollback` gives back the champion before; the version's "
        "log is on the Serve page of Ray's dashboard.",
        may_be_empty="nobody has called",
    ),
    Alert(
        name="RaylineSlow",
        value=f"histogram_quantile(0.99, {_BUCKETS})",
        above=0.5,
        for_s=300,
        severity=TICKET,
        summary=f"The p99 of {_VERSION} is {{{{ $value | humanizeDuration }}}}.",
        advice="Look whether its replicas are at their limit, or the cores are taken by a sweep.",
        may_be_empty="nobody has called",
    ),
    Alert(
        name="RaylineShadowFails",
        value=f"({_COPIES_FAILED} or 0 * {_COPIES}) / {_COPIES}",
        above=0.05,
        for_s=300,
        severity=TICKET,
        summary=f"Shadow {_VERSION} fails on {{{{ $value | humanizePercentage }}}} of its copies.",
        advice="Do not promote it; its log is on the Serve page of Ray's dashboard.",
        may_be_empty="no version is a shadow",
    ),
)
WATCHED = (
    Alert(
        name="RaylineDrift",
        value=_max(metrics.DRIFT_ALARM),
        above=0,
        for_s=0,
        severity=TICKET,
        summary="Requests to {{ $labels.model }} no longer look like its training data.",
        advice="The dashboard of data and drift shows what moved; label some of the requests, "
        "then `python -m jobs.submit retrain`.",
        may_be_empty=_NO_MONITOR,
    ),
    Alert(
        name="RaylineAccuracyFallen",
        # Where even the upper end of the interval is below what the test set promised.
        value=f"({_max(metrics.ACCURACY_EXPECTED)} - {_max(metrics.ACCURACY_HIGH)}"
        f" and on (model, version) {_max(metrics.LABELLED_ROWS)} >= 50)",
        above=0.02,
        for_s=0,
        severity=PAGE,
        summary=f"The accuracy of {_VERSION} is at least {{{{ $value | humanizePercentage }}}} "
        "below its test set's.",
        advice="`python -m jobs.deploy rollback` if the version before does better; else train "
        "again on labelled requests.",
        may_be_empty=_NO_MONITOR,
    ),
    Alert(
        name="RaylineRolloutPaused",
        value=_max(metrics.ROLLOUT_STATE, '{state="paused"}'),
        above=0,
        for_s=600,
        severity=TICKET,
        summary=f"The rollout of {_VERSION} waits: its gates have no data.",
        advice="Look whether the version is called, and whether the prediction log and Prometheus, "
        "or Ray's metrics, can be read; the rollout goes on by itself.",
        may_be_empty=_NO_ROLLOUT,
    ),
    Alert(
        name="RaylineRolledBack",
        value=_max(metrics.ROLLOUT_STATE, '{state="rolled_back"}'),
        above=0,
        for_s=0,
        severity=NOTE,
        summary=f"The rollout of {_VERSION} was stopped by a gate and taken back.",
        advice="The reason and the evidence are on the version in MLflow.",
        may_be_empty=_NO_ROLLOUT,
    ),
    Alert(
        name="RaylineTrialsFail",
        value=f'max by (sweep) ({metrics.SWEEP_TRIALS.exported}{{state="failed"}})'
        f" / sum by (sweep) (max by (sweep, state) ({metrics.SWEEP_TRIALS.exported}))",
        above=0.3,
        for_s=0,
        severity=TICKET,
        summary="{{ $value | humanizePercentage }} of the trials of sweep {{ $labels.sweep }} "
        "have failed.",
        advice="The reasons are on the runs below the sweep in MLflow.",
        may_be_empty="no sweep runs",
    ),
)
CLUSTER = (
    Alert(
        name="RaylineNoMetrics",
        value='min by (instance) (up{job="ray"})',
        below=1,
        for_s=120,
        severity=TICKET,
        summary="Ray's metrics at {{ $labels.instance }} can't be read.",
        advice="Look whether the node is alive; rollouts pause meanwhile.",
    ),
    Alert(
        name="RaylineDiskFull",
        value="min by (instance) (ray_node_disk_free / (ray_node_disk_usage + ray_node_disk_free))",
        below=0.1,
        for_s=300,
        severity=TICKET,
        summary="{{ $labels.instance }} has {{ $value | humanizePercentage }} of its disk left.",
        advice="Free space under the storage root and Ray's folder of sessions.",
    ),
    Alert(
        name="RaylineObjectStoreFull",
        value=f"sum(ray_object_store_memory) / {_STORE}",
        above=0.9,
        for_s=120,
        severity=TICKET,
        summary="Ray's object store is {{ $value | humanizePercentage }} full, and spills to disk.",
        advice="Fewer trials at a time, or more room: RAYLINE_OBJECT_STORE_BYTES.",
    ),
)
GROUPS = {"rayline-serving": SERVING, "rayline-watch": WATCHED, "rayline-cluster": CLUSTER}
ALERTS = SERVING + WATCHED + CLUSTER


def rules() -> str:
    """Return the rules as the YAML file that Prometheus reads."""
    groups = [
        {"name": name, "rules": [_rule(alert) for alert in alerts]}
        for name, alerts in GROUPS.items()
    ]
    text: str = yaml.safe_dump({"groups": groups}, sort_keys=False, width=100)
    return text


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": f"{alert.for_s}s",
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.advice},
    }
