"""Where current values come from: Prometheus if there is one, else Ray's metrics endpoints.

Either gives the same counters, so `lib.watch.counts.between` on two readings does for both. A
source that is down, wholly or in part, raises: it never looks like a version without requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import requests
from prometheus_client.parser import text_string_to_metric_families

from lib.errors import WatchError
from lib.serving.client import auth_headers
from lib.watch.counts import READ, Reading, Sample

PROMETHEUS_VARIABLE = "RAYLINE_PROMETHEUS_URL"
_TIMEOUT_S = 10.0
_SEEN_S = 60.0
"""A Prometheus in which Ray's metrics are older is not one that watches this cluster."""

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Gives the current values of some metrics."""

    @property
    def name(self) -> str:
        """Where that is, for people."""

    def samples(self, names: Iterable[str]) -> list[Sample]:
        """Return all series of these metrics; raise WatchError if some can't be had."""


class Prometheus:
    """A Prometheus server, asked over its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = f"Prometheus at {self._url}"

    def query(self, expr: str) -> list[Sample]:
        """Return what a query gives now, an instant vector or a scalar."""
        data = self._get("/api/v1/query", {"query": expr})
        if data["resultType"] == "scalar":
            return [Sample("", {}, float(data["result"][1]))]
        if data["resultType"] != "vector":
            raise WatchError(f"{expr!r} gives a {data['resultType']}, not one value a series")
        return [
            Sample(
                series["metric"].get("__name__", ""),
                {name: value for name, value in series["metric"].items() if name != "__name__"},
                float(series["value"][1]),
            )
            for series in data["result"]
        ]

    def rules(self) -> list[dict[str, Any]]:
        """Return the groups of rules that are loaded, with what became of each."""
        return list(self._get("/api/v1/rules", {})["groups"])

    def samples(self, names: Iterable[str]) -> list[Sample]:
        """Return all series of these metrics; raise WatchError if some target is down."""
        down = self.query('up{job="ray"} == 0')
        if down:
            where = ", ".join(sorted(sample.labels.get("instance", "?") for sample in down))
            raise WatchError(f"{self.name} can't read Ray's metrics at {where}")
        return self.query(f'{{__name__=~"{"|".join(names)}"}}')

    def watches(self) -> bool:
        """Whether it is there, and reads Ray's metrics."""
        try:
            return bool(self.query(f'max_over_time(up{{job="ray"}}[{_SEEN_S:.0f}s]) == 1'))
        except WatchError:
            return False

    def _get(self, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        try:
            answer = requests.get(
                f"{self._url}{path}", params=parameters, timeout=_TIMEOUT_S
            ).json()
        except (requests.RequestException, ValueError) as error:
            raise WatchError(
                f"Prometheus does not answer at {self._url}: {error}; start it, or take "
                f"{PROMETHEUS_VARIABLE} away to read Ray's metrics directly"
            ) from error
        if answer.get("status") != "success":
            raise WatchError(f"Prometheus at {self._url} refuses: {answer.get('error', answer)}")
        data: dict[str, Any] = answer["data"]
        return data


class RayEndpoints:
    """The endpoints of Ray's nodes that Prometheus would read."""

    name = "Ray's metrics endpoints"

    def __init__(self, targets: Callable[[], Iterable[str]]) -> None:
        self._targets = targets

    def samples(self, names: Iterable[str]) -> list[Sample]:
        """Return all series of these metrics; raise WatchError if some node does not answer."""
        wanted = frozenset(names)
        found: list[Sample] = []
        for target in self._targets():
            url = f"http://{target}/metrics"
            try:
                response = requests.get(url, timeout=_TIMEOUT_S)
                response.raise_for_status()
            except requests.RequestException as error:
                raise WatchError(f"Ray's metrics at {url} can't be read: {error}") from error
            found += parse(response.text, wanted, instance=target)
        return found


def parse(text: str, names: frozenset[str], *, instance: str) -> list[Sample]:
    """Return the samples of some metrics in Prometheus' text format."""
    # Of thousands of lines some dozens are wanted, and the parser takes its time for each.
    lines = [line for line in text.splitlines() if line.split("{", 1)[0].split(" ", 1)[0] in names]
    return [
        Sample(sample.name, {**sample.labels, "instance": instance}, sample.value)
        for family in text_string_to_metric_families("\n".join(lines) + "\n")
        for sample in family.samples
    ]


def ray_targets(ray_address: str) -> list[str]:
    """Return where Ray's nodes show their metrics, host:port, as Ray's dashboard lists them."""
    url = f"{ray_address.rstrip('/')}/api/prometheus/sd"
    try:
        response = requests.get(url, headers=auth_headers(), timeout=_TIMEOUT_S)
        response.raise_for_status()
        groups = response.json()
        targets = [str(target) for group in groups for target in group["targets"]]
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise WatchError(
            f"Ray's dashboard does not say at {url} where its metrics are: {error}; is the line "
            "up (`make up`)?"
        ) from error
    if not targets:
        raise WatchError(f"Ray's dashboard at {ray_address} lists no metrics yet; try again")
    return targets


def source(ray_address: str, env: Mapping[str, str]) -> Source:
    """Return the Prometheus of RAYLINE_PROMETHEUS_URL if it reads Ray, else Ray itself."""
    url = env.get(PROMETHEUS_VARIABLE, "")
    if url:
        # Asked here, once: two readings of one source can be compared, of two they can't.
        prometheus = Prometheus(url)
        if prometheus.watches():
            return prometheus
        _log.warning("no Prometheus that reads Ray's metrics at %s: reading them directly", url)
    return RayEndpoints(lambda: ray_targets(ray_address))


def read(source: Source, *, clock: Callable[[], float] = time.time) -> Reading:
    """Read the counters of all versions; raise WatchError if the source is down."""
    return Reading(source=source.name, time_s=clock(), samples=tuple(source.samples(READ)))
