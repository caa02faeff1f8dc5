"""Dashboards as they are rendered: against Grafana's schema and Ray's pages."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
from jsonschema import Draft7Validator
from ray.dashboard.modules.metrics import grafana_dashboard_factory as rays

from lib.watch import metrics
from lib.watch.alerts import ALERTS
from lib.watch.dashboards import DASHBOARDS, EMBEDDED, embedding
from lib.watch.files import rendered
from lib.watch.panels import (
    DATASOURCE_UID,
    STATES,
    TIMESERIES,
    Dashboard,
    Panel,
    Row,
    Target,
    digest_of,
    filled,
    render,
)
from tests import programs

ROOT = Path(__file__).resolve().parents[2]
# As Grafana publishes them: jsonschema/ of github.com/grafana/grafana-foundation-sdk at f178d5a,
# Apache-2.0. The SDK's own classes take what they do not know without a word.
SCHEMAS = Path(__file__).with_name("grafana_schema")
PLUGINS = {TIMESERIES: "timeseries", STATES: "statetimeline"}
RAY_PAGES = Path(ray.__file__).parent / "dashboard" / "client" / "build" / "static" / "js"


def problems(name: str, content: Any, definition: str = "") -> list[str]:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    if definition:
        schema["$ref"] = f"#/definitions/{definition}"
    found = Draft7Validator(schema).iter_errors(content)
    return [f"{name}: {error.json_path}: {error.message[:200]}" for error in found]


def all_problems(model: dict[str, Any]) -> list[str]:
    found = problems("dashboard", model)
    for panel in model["panels"]:
        if panel["type"] == "row":
            continue
        plugin = PLUGINS[panel["type"]]
        found += problems(plugin, panel["options"], "Options")
        custom = panel["fieldConfig"]["defaults"].get("custom", {})
        found += problems(plugin, custom, "FieldConfig")
        for target in panel["targets"]:
            found += problems("prometheus", target)
    return found


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_grafana_s_own_schema_accepts_it(dashboard: Dashboard) -> None:
    assert all_problems(render(dashboard)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("refresh",), 10),
        (("graphTooltip",), 7),
        (("panels", 1, "gridpos"), {}),
        (("panels", 1, "options", "legend", "placement"), "left"),
        (("panels", 1, "fieldConfig", "defaults", "custom", "drawStyle"), "dots"),
        (("panels", 1, "fieldConfig", "defaults", "color", "mode"), "rainbow"),
        (("panels", 1, "targets", 0, "legend"), "x"),
    ],
)
def test_the_schema_refuses_what_grafana_does_not_know(path: tuple[Any, ...], value: Any) -> None:
    model = copy.deepcopy(render(DASHBOARDS[0]))
    place: Any = model
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert all_problems(model)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_lie_side_by_side_with_numbers_of_their_own(dashboard: Dashboard) -> None:
    panels = render(dashboard)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_queries_ask_for_metrics_that_are_reported_and_for_nothing_unknown() -> None:
    known = {metric.exported for metric in (*metrics.COUNTERS, *metrics.GAUGES)}
    asked = set()
    for expr in (
        *(t.expr for board in DASHBOARDS for panel in board.panels() for t in panel.targets),
        *(alert.expr for alert in ALERTS),
    ):
        assert "$" not in filled(expr), expr
        asked |= set(re.findall(r"ray_rayline_\w+", expr))
    assert asked <= known
    assert {metric.exported for metric in metrics.GAUGES} <= asked


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    promtool = programs.promtool()
    exprs = [t.expr for board in DASHBOARDS for panel in board.panels() for t in panel.targets]
    rules = [
        {"record": f"panel:number_{index}", "expr": filled(expr)}
        for index, expr in enumerate(exprs)
    ]
    groups = {"groups": [{"name": "panels", "rules": rules}]}
    (tmp_path / "panels.json").write_text(json.dumps(groups))
    checked = subprocess.run(
        [promtool, "check", "rules", "--lint=none", str(tmp_path / "panels.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert f"{len(exprs)} rules found" in checked.stdout


def test_a_dashboard_s_digest_follows_what_is_rendered() -> None:
    def board(expr: str) -> Dashboard:
        panel = Panel(title="p", description="", targets=(Target(expr=expr, legend=""),))
        return Dashboard(
            uid="u", title="t", description="", rows=(Row(title="r", panels=(panel,)),)
        )

    one = render(board("up"))
    assert digest_of(one) == digest_of(render(board("up"))) != digest_of(render(board("down")))
    edited = copy.deepcopy(one)
    edited["panels"] = []
    assert digest_of(edited) == digest_of(one)
    assert digest_of({"title": "of somebody else"}) is None


def test_a_number_that_two_panels_have_is_refused() -> None:
    panel = Panel(title="p", description="", targets=(), id=7)
    with pytest.raises(ValueError, match="not unique"):
        Dashboard(uid="u", title="", description="", rows=(Row(title="", panels=(panel, panel)),))


def test_ray_s_pages_find_their_panels_in_our_dashboards() -> None:
    (script,) = RAY_PAGES.glob("main.*.js")
    asked = {int(number) for number in re.findall(r"panelId=(\d+)", script.read_text())}
    assert asked
    shown = {
        panel["id"] for dashboard in EMBEDDED.values() for panel in render(dashboard)["panels"]
    }
    assert asked <= shown
    cluster = {panel["id"] for panel in render(EMBEDDED["DEFAULT"])["panels"]}
    assert {24, 41} <= cluster
    serving = {panel["id"] for panel in render(EMBEDDED["SERVE"])["panels"]}
    assert asked - {41} <= serving


def test_ray_takes_our_dashboards_by_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in embedding("http://grafana.example:3000").items():
        monkeypatch.setenv(name, value)
    made = {
        "DEFAULT": rays.generate_default_grafana_dashboard,
        "DATA": rays.generate_data_grafana_dashboard,
        "SERVE": rays.generate_serve_grafana_dashboard,
        "SERVE_DEPLOYMENT": rays.generate_serve_deployment_grafana_dashboard,
    }
    assert {name: make()[1] for name, make in made.items()} == {
        name: dashboard.uid for name, dashboard in EMBEDDED.items()
    }


def test_the_files_under_deploy_are_what_the_code_renders() -> None:
    there = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("grafana", "prometheus")
        for path in (ROOT / "deploy" / folder).iterdir()
        if path.name.startswith("rayline-") or path.name == "alerts.yml"
    }
    assert there == rendered(), "run: python -c 'from lib.watch.files import write; write()'"
    assert DATASOURCE_UID in there["deploy/grafana/rayline-cluster.json"]
