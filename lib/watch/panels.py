"""Dashboards as data, and how they become Grafana's JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DATASOURCE_NAME = "Rayline Prometheus"
DATASOURCE_UID = "rayline-prometheus"
FOLDER_TITLE = "Rayline"
FOLDER_UID = "rayline"
"""Not Ray's own folder: Ray deletes and rewrites that one when a head starts."""

TIMESERIES, STATES = "timeseries", "state-timeline"

_DIGEST = "rayline_digest"
_SCHEMA_VERSION = 39
"""Of Grafana 11; a newer Grafana migrates it when it is opened."""
_GRID_WIDTH = 24
_HEIGHT = 8
_FIRST_ID = 101
"""Of panels that Ray's dashboard does not embed by a number of its own."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_FILLS = {"$__rate_interval": "1m", "$__range": "5m", "$model": ".*"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One query of a panel."""

    expr: str
    """PromQL; `$model` and `$__rate_interval` are filled in by Grafana."""
    legend: str
    """Name of a series, with `{{label}}` for its labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One graph."""

    title: str
    description: str
    targets: tuple[Target, ...]
    unit: str = "short"
    """Grafana's name of the unit."""
    kind: str = TIMESERIES
    stack: bool = False
    min: float | None = 0
    max: float | None = None
    log: bool = False
    limit: float | None = None
    """Where a red line is drawn."""
    id: int | None = None
    """The number by which Ray's dashboard embeds it, if it does."""
    may_be_empty: str = ""
    """When all of its queries rightly return nothing; empty if they never do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Panels side by side under one heading."""

    title: str
    panels: tuple[Panel, ...]
    columns: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    models_of: str | None = None
    """Metric whose label `model` fills the choice of a model; none: there is no such choice."""

    def __post_init__(self) -> None:
        """Check the numbers that others refer to."""
        ids = [panel.id for panel in self.panels() if panel.id is not None]
        if len(ids) != len(set(ids)) or any(number >= _FIRST_ID for number in ids):
            raise ValueError(f"dashboard {self.uid}: ids={sorted(ids)} are not unique below 101")

    def panels(self) -> Iterator[Panel]:
        """Yield all panels."""
        for row in self.rows:
            yield from row.panels


def filled(expr: str) -> str:
    """Return a query with what Grafana would fill in, for all models."""
    for name, value in _FILLS.items():
        expr = expr.replace(name, value)
    return expr


def render(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard as Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    next_id, y = _FIRST_ID, 0
    for row in dashboard.rows:
        place = {"h": 1, "w": _GRID_WIDTH, "x": 0, "y": y}
        panels.append(
            {
                "type": "row",
                "id": next_id,
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        next_id, y = next_id + 1, y + 1
        width = _GRID_WIDTH // row.columns
        for index, panel in enumerate(row.panels):
            down, across = divmod(index, row.columns)
            number = next_id if panel.id is None else panel.id
            next_id += panel.id is None
            place = {"h": _HEIGHT, "w": width, "x": across * width, "y": y + down * _HEIGHT}
            panels.append(_panel(panel, number) | {"gridPos": place})
        y += -(-len(row.panels) // row.columns) * _HEIGHT
    model = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["rayline"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "schemaVersion": _SCHEMA_VERSION,
        "templating": {"list": _variables(dashboard)},
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "Rayline",
                "tags": ["rayline"],
                "asDropdown": True,
                "icon": "external link",
                "includeVars": False,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
            }
        ],
        "panels": panels,
    }
    return _with_digest(model)


def digest_of(model: Mapping[str, Any]) -> str | None:
    """Return the digest that a rendered dashboard carries; Grafana keeps it, whatever it migrates.

    It is the digest of what was rendered: a person's changes in Grafana do not change it.
    """
    for variable in model.get("templating", {}).get("list", []):
        if variable.get("name") == _DIGEST:
            return str(variable.get("query"))
    return None


def _with_digest(model: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]
    model["templating"]["list"].append(
        {
            "type": "constant",
            "name": _DIGEST,
            "query": digest,
            "current": {"text": digest, "value": digest},
            "hide": 2,
            "skipUrlSync": True,
        }
    )
    return model


def _variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    variables: list[dict[str, Any]] = [
        {
            "type": "datasource",
            "name": "datasource",
            "label": "Prometheus",
            "query": "prometheus",
            "current": {"text": DATASOURCE_NAME, "value": DATASOURCE_UID},
            "hide": 0,
        }
    ]
    if dashboard.models_of is not None:
        query = f"label_values({dashboard.models_of}, model)"
        variables.append(
            {
                "type": "query",
                "name": "model",
                "label": "Model",
                "datasource": _SOURCE,
                "query": query,
                "refresh": 2,
                "includeAll": True,
                "allValue": ".*",
                "multi": True,
                "current": {"text": ["All"], "value": ["$__all"]},
                "hide": 0,
            }
        )
    return variables


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": target.expr,
            "legendFormat": target.legend,
            "range": True,
        }
        for index, target in enumerate(panel.targets)
    ]
    return {
        "type": panel.kind,
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"value": None, "color": "green"}]
    if panel.limit is not None:
        steps.append({"value": panel.limit, "color": "red"})
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    defaults |= {"min": panel.min} if panel.min is not None and not panel.log else {}
    defaults |= {"max": panel.max} if panel.max is not None else {}
    if panel.kind == TIMESERIES:
        scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stack else 5,
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
            "scaleDistribution": scale,
            "thresholdsStyle": {"mode": "off" if panel.limit is None else "line"},
        }
    return defaults


_OPTIONS: dict[str, dict[str, Any]] = {
    TIMESERIES: {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    STATES: {
        "showValue": "never",
        "rowHeight": 0.9,
        "mergeValues": True,
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    },
}
