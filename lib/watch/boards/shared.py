"""What several dashboards show: queries over the chosen models, and panels by version."""

from __future__ import annotations

from lib.watch import metrics
from lib.watch.metrics import Metric
from lib.watch.panels import Panel, Target

NO_MONITOR = "no monitor runs"
NO_SHADOW = "no version is a shadow"


def rate(metric: Metric, by: str, where: str = "") -> str:
    """Return how fast a counter grows, by labels, for the chosen models."""
    matchers = f'model=~"$model"{where and ", "}{where}'
    return f"sum by ({by}) (rate({metric.exported}{{{matchers}}}[$__rate_interval]))"


def now(metric: Metric, where: str = "") -> str:
    """Return a gauge, as the last job that runs reports it, for the chosen models."""
    matchers = f'model=~"$model"{where and ", "}{where}'
    return f"max by ({', '.join(metric.labels)}) ({metric.exported}{{{matchers}}})"


def quantile(q: float) -> str:
    """Return a quantile of the latency by version, in seconds, for the chosen models."""
    buckets = rate(metrics.LATENCY_BUCKET, "model, version, le")
    return f"histogram_quantile({q}, {buckets})"


PER_VERSION = "model, version"
VERSION = "{{model}} {{version}}"
ANSWERED = 'version!=""'
FAILED = 'version!="", status=~"5.."'
_REQUESTS = rate(metrics.REQUESTS, PER_VERSION, ANSWERED)

REQUESTS = Panel(
    id=7,
    title="Requests/s by version",
    description="Requests that a version answered, with any status.",
    unit="reqps",
    stack=True,
    targets=(Target(expr=_REQUESTS, legend=VERSION),),
)
ERRORS = Panel(
    id=8,
    title="Errors by version",
    description="Share of a version's answers that were 5xx.",
    unit="percentunit",
    limit=0.01,
    targets=(
        Target(
            # A version without an error has no such counter: it counts as zero.
            expr=f"({rate(metrics.REQUESTS, PER_VERSION, FAILED)} or 0 * {_REQUESTS})"
            f" / {_REQUESTS}",
            legend=VERSION,
        ),
    ),
)
LATENCY = Panel(
    id=15,
    title="Latency by version",
    description="From a request's first byte in the gateway to its answer.",
    unit="s",
    targets=tuple(
        Target(expr=quantile(q), legend=f"{VERSION} p{100 * q:g}") for q in (0.5, 0.9, 0.99)
    ),
)
SHARE = Panel(
    id=20,
    title="Share of traffic",
    description="Of the requests to a model, how many each version answered.",
    unit="percentunit",
    stack=True,
    max=1,
    targets=(
        Target(
            expr=f"{_REQUESTS} / on (model) group_left () "
            f"{rate(metrics.REQUESTS, 'model', ANSWERED)}",
            legend=VERSION,
        ),
    ),
)
SHADOWS = Panel(
    id=22,
    title="Shadows",
    description="Copies of requests, by what became of them.",
    unit="reqps",
    stack=True,
    may_be_empty=NO_SHADOW,
    targets=(
        Target(
            expr=rate(metrics.SHADOWED, "model, version, result"),
            legend=f"{VERSION} {{{{result}}}}",
        ),
    ),
)
ACCURACY = Panel(
    title="Accuracy by version",
    description="Of the labelled answers in the monitor's window, with its 95 % interval, and what "
    "the test set gave at registration.",
    unit="percentunit",
    min=None,
    max=1,
    may_be_empty=NO_MONITOR,
    targets=tuple(
        Target(expr=now(metric), legend=f"{VERSION} {name}".rstrip())
        for metric, name in (
            (metrics.ACCURACY, ""),
            (metrics.ACCURACY_LOW, "low"),
            (metrics.ACCURACY_HIGH, "high"),
            (metrics.ACCURACY_EXPECTED, "test set"),
        )
    ),
)
DISAGREEMENT = Panel(
    title="Disagreement",
    description="Share of a shadow's answers that were unlike the champion's.",
    unit="percentunit",
    max=1,
    may_be_empty=NO_MONITOR,
    targets=(Target(expr=now(metrics.DISAGREEMENT), legend=VERSION),),
)
