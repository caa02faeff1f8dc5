"""What Prometheus reads at a gateway's /metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from lib.serving.record import Record
from lib.watch.metrics import LATENCY_BUCKETS_S, LOGGED, SHADOWED
from serve_apps.exposition import Exposition
from tests.unit.serving_parts import card


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_text_is_a_standard_histogram_and_counts_go_on_over_reports() -> None:
    current = [Record()]
    exposition = Exposition("abc", lambda: current[0], lambda: 4)
    for seconds in (0.00005, 0.0003, 0.03, 60.0):
        current[0].add("day", 200, card(2), seconds)
    first = exposition.render()
    # What is reported counts on, with what comes after it.
    exposition.add(
        current[0],
        [(SHADOWED, ("shapes", "3", "agreed"), 2.0), (LOGGED, ("written",), 5.0)],
    )
    current[0] = Record()
    assert exposition.render().count(b"\n") >= first.count(b"\n")
    current[0].add("day", 500, card(2), 0.0003)
    current[0].add("unknown", 401, None, 0.1)
    exposition.add(Record(), [(LOGGED, ("written",), 1.0)])

    found = values(exposition.render())
    version = (("gateway", "abc"), ("model", "shapes"), ("version", "2"))
    name = "rayline_request_latency_seconds"

    def bucket(bound: str) -> float:
        return found[f"{name}_bucket", tuple(sorted((*version, ("le", bound))))]

    assert (bucket("0.0001"), bucket("0.0002"), bucket("0.0005")) == (1, 1, 3)
    assert (bucket("0.05"), bucket("10"), bucket("+Inf")) == (4, 4, 5)
    assert found[f"{name}_count", version] == 5
    assert abs(found[f"{name}_sum", version] - 60.03065) < 1e-9
    assert sum(key[0] == f"{name}_bucket" for key in found) == len(LATENCY_BUCKETS_S)
    requests = {key: value for key, value in found.items() if key[0] == "rayline_requests_total"}
    assert sorted(requests.values()) == [1, 1, 4]
    by_status = {dict(labels)["status"]: value for (_, labels), value in requests.items()}
    assert by_status == {"200": 4, "500": 1, "401": 1}
    assert (
        found["rayline_logged_predictions_total", (("gateway", "abc"), ("result", "written"))] == 6
    )
    assert found["rayline_requests_in_flight", (("gateway", "abc"),)] == 4
    assert b"# TYPE rayline_request_latency_seconds histogram" in exposition.render()
