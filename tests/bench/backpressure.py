"""Backpressure: far more asks than can be answered; how soon one more caller hears, and what.

python -m tests.bench backpressure --seconds 10
"""

from __future__ import annotations

import http.client
import statistics
import threading
import time
from urllib.parse import urlsplit

from tests.bench import wrk
from tests.bench.report import BenchError, Options, Report, Table, figure, say
from tests.bench.systems import System, rayline_alone

_LOADS = (128, 1500)
"""Connections: what gateways admit at once, and several times that."""
_PROBE_EVERY_S = 0.02
_CONNECTING_S = 4.0
"""Until all connections are open: the gateways' event loop (uvloop) accepts one a turn."""

Answers = dict[int, list[float]]
"""Status → milliseconds of each answer."""


def run(options: Options) -> Report:
    rows: list[tuple[str, ...]] = []
    data: dict[str, dict[str, list[float]]] = {}
    with rayline_alone(options.temp) as systems:
        for system in systems:
            for connections in _LOADS:
                say(f"backpressure: {system.name}, {connections} connections")
                answers = _probe_under_load(system, connections, options.seconds)
                data[f"{system.name}/{connections}"] = {str(s): ms for s, ms in answers.items()}
                rows += [
                    (system.name, str(connections), str(status), str(len(ms)), *_quantiles(ms))
                    for status, ms in sorted(answers.items())
                ]
    return Report(
        title="Backpressure",
        tables=[
            Table(
                title=f"One more caller, beside load for {options.seconds:g} s",
                columns=("", "connections", "status", "answers", "p50 ms", "p99 ms", "max ms"),
                rows=rows,
            )
        ],
        notes=[
            "A probe asks on a connection of its own, one question after another. The load's "
            "connections ask again at once after an answer, after a refusal when Retry-After says."
        ],
        data=data,
    )


def _quantiles(ms: list[float]) -> tuple[str, str, str]:
    ordered = sorted(ms)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return figure(statistics.median(ordered), 1), figure(p99, 1), figure(ordered[-1], 1)


def _probe_under_load(system: System, connections: int, seconds: float) -> Answers:
    answers: Answers = {}
    stop = threading.Event()
    failure: list[Exception] = []

    def probe() -> None:
        stop.wait(_CONNECTING_S)
        try:
            _ask_until(stop, system, answers)
        except Exception as error:
            failure.append(error)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        wrk.post(
            system.url,
            system.folder / system.body,
            connections=connections,
            seconds=_CONNECTING_S + seconds,
            refusals_allowed=True,
            heeds_retry_after=True,
        )
    finally:
        stop.set()
        prober.join()
    if failure:
        raise BenchError(f"the probe of {system.name} failed: {failure[0]!r}") from failure[0]
    if bad := set(answers) - {200, 503}:
        raise BenchError(f"{system.name} answered with {sorted(bad)} under load")
    return answers


def _ask_until(stop: threading.Event, system: System, answers: Answers) -> None:
    parts = urlsplit(system.url)
    body = (system.folder / system.body).read_bytes()
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    while not stop.wait(_PROBE_EVERY_S):
        start = time.perf_counter()
        connection.request("POST", parts.path, body, {"Content-Type": system.content_type})
        answer = connection.getresponse()
        answer.read()
        answers.setdefault(answer.status, []).append(1e3 * (time.perf_counter() - start))
        if answer.status == 503 and answer.headers["Retry-After"] is None:
            raise BenchError("a refusal without Retry-After")
    connection.close()
