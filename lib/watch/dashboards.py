"""Rayline's dashboards, as data, and as files.

Ray's own dashboard embeds three of them in the place of Ray's, by the numbers that its pages ask
for (`EMBEDDED` says which): cluster in its Metrics tab and overview (24, 41), data and drift in the
tab beside it, serving on the Serve pages (2, 3, 5 for a deployment, 7, 8, 15 and 20 to 25 for all).
"""

from __future__ import annotations

import json

from lib.watch.boards.cluster import CLUSTER
from lib.watch.boards.drift import DRIFT
from lib.watch.boards.rollout import ROLLOUT
from lib.watch.boards.serving import SERVING
from lib.watch.boards.training import TRAINING
from lib.watch.panels import DATASOURCE_NAME, render

DASHBOARDS = (CLUSTER, TRAINING, SERVING, ROLLOUT, DRIFT)
EMBEDDED = {
    "DEFAULT": CLUSTER,
    "DATA": DRIFT,
    "SERVE": SERVING,
    "SERVE_DEPLOYMENT": SERVING,
}
"""Ray's name of a dashboard → the one to embed instead: RAY_GRAFANA_<name>_DASHBOARD_UID."""


def embedding(grafana_url: str) -> dict[str, str]:
    """Return the settings with which Ray's dashboard embeds these of a Grafana.

    Where browsers reach Grafana elsewhere than Ray's head does, RAY_GRAFANA_IFRAME_HOST says so.
    That Grafana must allow it: `allow_embedding`, and viewers without a login or with Ray's.
    """
    uids = {
        f"RAY_GRAFANA_{name}_DASHBOARD_UID": dashboard.uid for name, dashboard in EMBEDDED.items()
    }
    return {"RAY_GRAFANA_HOST": grafana_url, "RAY_PROMETHEUS_NAME": DATASOURCE_NAME, **uids}


def files() -> dict[str, str]:
    """Return the dashboards as files for people who import them by hand, by name."""
    return {
        f"{dashboard.uid}.json": json.dumps(render(dashboard), indent=2) + "\n"
        for dashboard in DASHBOARDS
    }
