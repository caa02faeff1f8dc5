"""Serving: Rayline, Ray Serve's defaults, and FastAPI + uvicorn, with the same ONNX model."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from lib.serving.predictor import OnnxPredictor
from lib.storage import Storage
from tests.bench import models, wrk
from tests.bench.report import Options, Report, Table, figure, ratio, say, spread, turns
from tests.bench.systems import WEIGHTS, System, check_answers, fastapi, rayline, serve_defaults

CONNECTIONS = (1, 32, 128)
_WARM_S = 1.0
_IDLE_S = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One system under one load, once."""

    load: wrk.Load
    cpu_ms_per_request: float
    """Of the processes that a request passes: proxies and replicas, or the server."""
    all_cpu_ms_per_request: float
    """Of all processes: Ray's head, dashboard and controllers too."""


Results = dict[str, dict[int, list[Measured]]]
"""System → connections → rounds."""


def run(options: Options) -> Report:
    wrk.require()
    folder = options.temp / "s"
    folder.mkdir()
    say("serving: exporting two versions of the model")
    bundles = models.write_bundles(Storage(str(folder / "storage")), num_versions=len(WEIGHTS))
    with ExitStack() as stack:
        systems = [
            stack.enter_context(system)
            for system in (rayline(folder), fastapi(folder), serve_defaults(folder))
        ]
        image = models.sample_image()
        (folder / "image.raw").write_bytes(image.tobytes())
        check_answers(systems, image, OnnxPredictor(bundles[0]))
        idle = {system.name: _idle_cpu(system) for system in systems}
        results = _measure(systems, folder / "image.raw", options)
    return _report(systems, results, idle, options)


def _measure(systems: Sequence[System], body: Path, options: Options) -> Results:
    results: Results = {system.name: {c: [] for c in CONNECTIONS} for system in systems}
    by_name = {system.name: system for system in systems}
    num_loads = len(systems) * len(CONNECTIONS) * options.rounds
    say(
        f"serving: {num_loads} loads of {options.seconds:g} s after {_WARM_S:g} s of warm-up, "
        f"about {num_loads * (options.seconds + _WARM_S + 1):.0f} s"
    )
    for connections in CONNECTIONS:
        for turn, name in turns(list(by_name), options.rounds):
            measured = _measure_one(by_name[name], body, connections, options.seconds)
            results[name][connections].append(measured)
            load = measured.load
            say(
                f"serving: {connections} connections, round {turn + 1}: {name} "
                f"{load.requests_per_s:,.0f}/s, p50 {load.p50_ms:.2f} ms, p99 {load.p99_ms:.2f} ms"
            )
    return results


def _measure_one(system: System, body: Path, connections: int, seconds: float) -> Measured:
    wrk.post(system.url, body, connections=connections, seconds=_WARM_S)
    before = _cpu_seconds(system.processes())
    load = wrk.post(system.url, body, connections=connections, seconds=seconds)
    after = _cpu_seconds(system.processes())
    spent = {process: seconds - before.get(process, 0.0) for process, seconds in after.items()}
    serving = sum(seconds for process, seconds in spent.items() if _passes_requests(process))
    return Measured(
        load=load,
        cpu_ms_per_request=1e3 * serving / load.requests,
        all_cpu_ms_per_request=1e3 * sum(spent.values()) / load.requests,
    )


def _cpu_seconds(processes: Sequence[psutil.Process]) -> dict[psutil.Process, float]:
    """Return user and system seconds so far; what ends meanwhile doesn't count."""
    seconds = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process] = times.user + times.system
    return seconds


def _passes_requests(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    named = ("ServeReplica:", "ProxyActor", "HAProxyManager", "haproxy", "fastapi_peer")
    return any(name in title for name in named)


def _idle_cpu(system: System) -> float:
    """Return the share of a core that a system takes when nobody asks it anything."""
    before = _cpu_seconds(system.processes())
    started = time.monotonic()
    time.sleep(_IDLE_S)
    after = _cpu_seconds(system.processes())
    spent = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())
    return spent / (time.monotonic() - started)


def _report(
    systems: Sequence[System], results: Results, idle: dict[str, float], options: Options
) -> Report:
    tables = [
        _table(systems, {name: by[connections] for name, by in results.items()}, connections)
        for connections in CONNECTIONS
    ]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in idle.items())
    return Report(
        title="Serving",
        tables=tables,
        notes=[
            f"n = {options.rounds} loads of {options.seconds:g} s each, in turns; medians "
            "(min–max); ratios are medians of the rounds' ratios. wrk with one thread and "
            "keep-alive connections on the same cores; closed loop, so a slow answer delays the "
            "next question of its connection. No request failed.",
            "Same ONNX file, ONNX Runtime with one thread, the raw bytes of one image. Only "
            "FastAPI serves one version without a split.",
            "CPU: user and system time per request of the processes that a request passes "
            "(proxies, replicas, server); in brackets with Ray's head, dashboard and controllers.",
            f"All systems are up all the time; idle they take, of one core: {shares}.",
        ],
        data={
            "idle_cores": idle,
            "rounds": {
                name: {
                    str(connections): [dataclasses.asdict(measured) for measured in rounds]
                    for connections, rounds in by.items()
                }
                for name, by in results.items()
            },
        },
    )


def _table(systems: Sequence[System], rounds: dict[str, list[Measured]], connections: int) -> Table:
    speed = {name: [m.load.requests_per_s for m in all_] for name, all_ in rounds.items()}
    rows = []
    for system in systems:
        measured = rounds[system.name]
        cpu = _median(m.cpu_ms_per_request for m in measured)
        all_cpu = _median(m.all_cpu_ms_per_request for m in measured)
        rows.append(
            (
                system.title,
                spread(speed[system.name]),
                figure(_median(m.load.p50_ms for m in measured), 2),
                figure(_median(m.load.p99_ms for m in measured), 2),
                f"{cpu:.2f} ({all_cpu:.2f})",
                ratio(speed["rayline"], speed[system.name]),
            )
        )
    noun = "connection" if connections == 1 else "connections"
    return Table(
        title=f"{connections} {noun}",
        columns=("", "requests/s", "p50 ms", "p99 ms", "CPU ms/request", "rayline ÷ this"),
        rows=rows,
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
