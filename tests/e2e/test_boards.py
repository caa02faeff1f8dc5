"""Every panel and every alert, asked of a real Prometheus that reads a live line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import requests

from lib.line.layout import PROJECT_ROOT
from lib.watch.alerts import ALERTS
from lib.watch.counts import between
from lib.watch.dashboards import DASHBOARDS
from lib.watch.panels import filled
from lib.watch.prometheus import (
    PROMETHEUS_VARIABLE,
    Prometheus,
    RayEndpoints,
    Source,
    read,
    source,
)
from tests import programs
from tests.data_sources import mnist
from tests.e2e.clients import post_all, until
from tests.e2e.conftest import LiveLine

SEEN_S = 90
"""A count takes 5 s in the gateway, 10 in Ray and 10 to Prometheus, and a rate needs two."""
POLL_S = 2.0
EMPTY_HERE = {
    ("rayline-cluster", "GPU memory"),  # no GPU
    ("rayline-cluster", "Tasks"),  # none waits or runs
    ("rayline-training", "GPUs"),
    ("rayline-serving", "Errors by gateway"),  # no request failed
}
"""Panels that may show nothing on this line."""


@pytest.fixture(scope="module")
def prometheus(line: LiveLine) -> Prometheus:
    programs.require("prometheus")
    # Ray's token is found by the environment, as in a shell that read the line's env file.
    os.environ.update(line.env)
    return Prometheus(line.env[PROMETHEUS_VARIABLE])


@pytest.fixture(scope="module")
def versions(line: LiveLine) -> tuple[str, str]:
    """The champion and another."""
    model = requests.get(f"{line.url}/traffic", timeout=60).json()["models"][line.model]
    champion = str(model["champion"])
    return champion, next(number for number in model["bundles"] if number != champion)


@pytest.fixture(scope="module")
def watched(
    line: LiveLine, prometheus: Prometheus, versions: tuple[str, str]
) -> Iterator[Prometheus]:
    """With traffic, a shadow, and jobs that report: all that there is to see is there."""
    champion, other = versions
    deploy(line, f"{champion}=100", "--shadow", f"{other}=100")
    reporter = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.reported", line.model, champion],
        cwd=PROJECT_ROOT,
        env=dict(line.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert reporter.stdout is not None
        assert "reported" in reporter.stdout.readline()

        def all_there() -> bool:
            ask(line, champion)
            return set(without_data(prometheus)) <= EMPTY_HERE

        until(all_there, deadline_s=SEEN_S, every_s=POLL_S, what="data for all panels")
        yield prometheus
    except AssertionError as error:
        raise AssertionError(f"{error}; none for {without_data(prometheus)}") from error
    finally:
        reporter.communicate("", timeout=60)
        deploy(line, f"{champion}=90", f"{other}=10")


def deploy(line: LiveLine, *weights: str) -> None:
    done = line.run("jobs.deploy", "weights", *weights)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def ask(line: LiveLine, version: str, count: int = 20) -> None:
    image = mnist("test")[0][0].tobytes()
    answers = post_all(line.url, [(image, {"X-Model-Version": version})] * count, num_clients=2)
    assert {answer["model_version"] for answer in answers} == {int(version)}


def without_data(prometheus: Prometheus) -> list[tuple[str, str]]:
    return [
        (dashboard.uid, panel.title)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels()
        if not all(has_data(prometheus, target.expr) for target in panel.targets)
    ]


def has_data(prometheus: Prometheus, expr: str) -> bool:
    return any(not math.isnan(found.value) for found in prometheus.query(filled(expr)))


def test_every_panel_shows_data_or_rightly_none(watched: Prometheus) -> None:
    assert set(without_data(watched)) <= EMPTY_HERE
    said = {
        (dashboard.uid, panel.title): panel.may_be_empty
        for dashboard in DASHBOARDS
        for panel in dashboard.panels()
    }
    assert all(said[panel] for panel in EMPTY_HERE)


def test_every_alert_has_something_to_watch_and_one_has_something_to_tell(
    watched: Prometheus,
) -> None:
    assert [alert.name for alert in ALERTS if not watched.query(alert.value)] == []
    # The rules that `make up` gave to its Prometheus: loaded, and evaluated without an error.
    rules = {rule["name"]: rule for group in watched.rules() for rule in group["rules"]}
    assert set(rules) == {alert.name for alert in ALERTS}
    until(
        lambda: bool(watched.query('ALERTS{alertname="RaylineDrift", alertstate="firing"}')),
        deadline_s=30,
        every_s=POLL_S,
        what="the alarm that was reported",
    )
    rules = {rule["name"]: rule for group in watched.rules() for rule in group["rules"]}
    assert {rule["health"] for rule in rules.values()} == {"ok"}, rules
    firing = {name for name, rule in rules.items() if rule["state"] == "firing"}
    assert not firing & {"RaylineNoGateway", "RaylineErrors", "RaylineNoMetrics"}


@pytest.mark.parametrize("with_prometheus", [True, False])
def test_the_same_requests_are_counted_with_and_without_prometheus(
    line: LiveLine, watched: Prometheus, versions: tuple[str, str], with_prometheus: bool
) -> None:
    env = line.env if with_prometheus else {}
    chosen: Source = source(line.env["RAY_API_SERVER_ADDRESS"], env)
    assert isinstance(chosen, Prometheus if with_prometheus else RayEndpoints)
    # Nobody else calls this version.
    key = (line.model, versions[1])
    before = read(chosen)
    ask(line, versions[1], 30)

    def all_counted() -> bool:
        counts = between(before, read(chosen)).get(key)
        return bool(counts) and counts.requests >= 30 and counts.buckets.get(math.inf, 0) >= 30

    until(all_counted, deadline_s=SEEN_S, every_s=1.0, what="30 requests counted")
    counts = between(before, read(chosen))[key]
    assert (counts.requests, counts.errors) == (30, 0)
    assert counts.buckets[math.inf] == 30
    assert 0 < counts.quantile_s(0.5) <= counts.quantile_s(0.99) < 10
