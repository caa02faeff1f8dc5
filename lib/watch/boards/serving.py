"""The dashboard of what callers get, by version."""

from __future__ import annotations

from dataclasses import replace

from lib.watch import metrics
from lib.watch.boards.shared import ANSWERED, ERRORS, LATENCY, REQUESTS, SHADOWS, SHARE, rate
from lib.watch.panels import Dashboard, Panel, Row, Target


def _per_gateway(panel: Panel, number: int, expr: str) -> Panel:
    title = panel.title.replace("by version", "by gateway")
    return replace(
        panel, id=number, title=title, targets=(Target(expr=expr, legend="{{WorkerId}}"),)
    )


SERVING = Dashboard(
    uid="rayline-serving",
    title="Rayline: serving by version",
    description="What callers get from each version of each model.",
    models_of=metrics.REQUESTS.exported,
    rows=(
        Row(title="Versions", panels=(REQUESTS, ERRORS, LATENCY)),
        Row(
            title="Traffic",
            panels=(
                SHARE,
                Panel(
                    id=21,
                    title="Answers by status",
                    description="Of all requests, also those that met no version (401, 404).",
                    unit="reqps",
                    stack=True,
                    targets=(Target(expr=rate(metrics.REQUESTS, "status"), legend="{{status}}"),),
                ),
                SHADOWS,
                Panel(
                    id=23,
                    title="Requests/s by caller",
                    description="Callers are named by their API keys.",
                    unit="reqps",
                    stack=True,
                    targets=(Target(expr=rate(metrics.REQUESTS, "caller"), legend="{{caller}}"),),
                ),
                Panel(
                    id=24,
                    title="Replicas",
                    description="Healthy replicas of gateways and versions; a version that nobody "
                    "calls has none.",
                    targets=(
                        Target(
                            expr="sum by (application) (ray_serve_deployment_replica_healthy)",
                            legend="{{application}}",
                        ),
                    ),
                ),
                Panel(
                    id=25,
                    title="Connections",
                    description="Open connections at HAProxy, by the port's name.",
                    may_be_empty="the cluster was started without HAProxy",
                    targets=(
                        Target(
                            expr="sum by (proxy) (haproxy_frontend_current_sessions)",
                            legend="{{proxy}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="Gateways",
            panels=(
                _per_gateway(REQUESTS, 2, rate(metrics.REQUESTS, "WorkerId")),
                _per_gateway(
                    replace(
                        ERRORS,
                        unit="reqps",
                        limit=None,
                        description="5xx of any version.",
                        may_be_empty="no request failed",
                    ),
                    3,
                    rate(metrics.REQUESTS, "WorkerId", 'status=~"5.."'),
                ),
                _per_gateway(
                    replace(LATENCY, title="Mean latency by gateway"),
                    5,
                    f"{rate(metrics.LATENCY_SUM, 'WorkerId')} / "
                    f"{rate(metrics.REQUESTS, 'WorkerId', ANSWERED)}",
                ),
            ),
        ),
    ),
)
