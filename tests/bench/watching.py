"""Watching: what the prediction log costs the data plane, in requests/s with and without it.

python -m tests.bench watching --rounds 10 --seconds 6
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import ServingError
from lib.serving.client import ServeClient, live_applications, wait_until
from lib.serving.plan import GATEWAY, serve_config
from lib.storage import Storage
from lib.watch import predictions
from tests.bench import log_switch, models, wrk
from tests.bench.log_switch import ALL, NO_IMAGES, OFF
from tests.bench.parts import ROOT
from tests.bench.report import BenchError, Options, Report, Table, figure, say, spread, turns
from tests.bench.systems import System, rayline_alone, settings_of

MOST_COST = 0.05
"""Of the requests/s, that watching may cost."""
_WAYS = {
    ALL: "every answer, images as by default",
    NO_IMAGES: "every answer (RAYLINE_LOG_IMAGES=0)",
    OFF: "no log",
}
_MODELS = {"isolated": models.ISOLATED_NAME, "colocated": models.COLOCATED_NAME}
_NUM_GATEWAYS = 2
_CONNECTIONS = 32
_WARM_S = 1.0
_QUIET_S = 3.0
"""After a load: gateways write what it left every two seconds, and not while the next one runs."""
_DEADLINE_S = 180.0

Loads = Mapping[str, Sequence[wrk.Load]]
"""By way to log."""


def run(options: Options) -> Report:
    with rayline_alone(options.temp, _with_bench) as systems:
        folder = systems[0].folder
        file = folder / "log-switch"
        file.write_text(ALL)
        client = ServeClient(settings_of(folder))
        _let_it_switch(client, folder, file)
        for system in systems:
            _check(system, client, file)
        found = {system.name: _measure(system, client, file, options) for system in systems}
    costs = {name: _cost(loads) for name, loads in found.items()}
    worst = max(costs, key=lambda name: costs[name])
    verdict = "kept" if costs[worst] <= MOST_COST else "NOT KEPT"
    return Report(
        title="Watching",
        tables=[_table(name, loads) for name, loads in found.items()],
        notes=[
            f"n = {options.rounds} loads of {options.seconds:g} s each from {_CONNECTIONS} "
            "connections, in turns in the same processes; medians (min–max), ratios of the same "
            "round. No request failed.",
            f"The log costs {', '.join(f'{name} {cost:+.1%}' for name, cost in costs.items())} of "
            f"the requests/s; the bar, {MOST_COST:.0%}, is {verdict}.",
        ],
        data={
            name: {way: [dataclasses.asdict(load) for load in mine] for way, mine in loads.items()}
            for name, loads in found.items()
        },
    )


def _with_bench(env: dict[str, str]) -> dict[str, str]:
    """Let replicas import the switch."""
    return env | {"PYTHONPATH": str(ROOT)}


def _let_it_switch(client: ServeClient, folder: Path, file: Path) -> None:
    """Give the gateways the switch, and let no replica come or go while it is measured."""
    live = copy.deepcopy(live_applications(client.details()))
    for name, config in live.items():
        for deployment in config["deployments"]:
            scaling = deployment["autoscaling_config"]
            number = _NUM_GATEWAYS if name == GATEWAY else 1
            scaling |= {"min_replicas": number, "max_replicas": number, "initial_replicas": number}
    variables = live[GATEWAY]["runtime_env"]["env_vars"]
    for variable, value in variables.items():
        if value.startswith("serve_apps.fast_lane:"):
            variables[variable] = f"{log_switch.__name__}:gateway"
    variables[log_switch.VARIABLE] = str(file)
    client.apply(serve_config(settings_of(folder), list(live.values())))
    say("watching: waiting for gateways with the switch")
    _await_followed(client, file, ALL)


def _await_followed(client: ServeClient, file: Path, way: str) -> None:
    """Wait until the gateways are those that have the switch, and all have turned it."""

    def followed() -> bool:
        try:
            deployments = client.details()["applications"][GATEWAY]["deployments"]
        except ServingError:  # While replicas start, two cores are busy for long.
            return False
        replicas: list[Any] = [
            replica for found in deployments.values() for replica in found["replicas"]
        ]
        said = log_switch.followed_by(file)
        return len(replicas) == _NUM_GATEWAYS and all(
            replica["state"] == "RUNNING" and said.get(replica["pid"]) == way
            for replica in replicas
        )

    wait_until(followed, deadline_s=_DEADLINE_S, what=f"gateways that log {way}")


def _switch(client: ServeClient, file: Path, way: str) -> None:
    file.write_text(way)
    _await_followed(client, file, way)


def _check(system: System, client: ServeClient, file: Path) -> None:
    """See that the log is what it is said to be: else nothing is compared with nothing."""
    storage, model = Storage(str(system.folder / "storage")), _MODELS[system.name]
    for way in _WAYS:
        _switch(client, file, way)
        start_us = time.time_ns() // 1000
        load = _post(system, 2)
        time.sleep(_QUIET_S)
        rows = predictions.read(
            storage,
            model,
            start_us=start_us,
            end_us=time.time_ns() // 1000,
            columns=["image"],
        )
        images = rows.num_rows - rows["image"].null_count
        say(f"watching: {system.name}, {way}: {load.requests} asked, {rows.num_rows} logged")
        is_logged = rows.num_rows >= 0.9 * load.requests if way != OFF else not rows.num_rows
        if not is_logged or (images > 0) != (way == ALL):
            raise BenchError(
                f"{system.name} was to log {_WAYS[way]}: of {load.requests} answers "
                f"{rows.num_rows} are in the log, {images} with an image"
            )


def _measure(system: System, client: ServeClient, file: Path, options: Options) -> Loads:
    loads: dict[str, list[wrk.Load]] = {way: [] for way in _WAYS}
    for turn, way in turns(list(_WAYS), options.rounds):
        _switch(client, file, way)
        _post(system, _WARM_S)
        load = _post(system, options.seconds)
        loads[way].append(load)
        say(f"watching: {system.name}, round {turn + 1}: {way} {load.requests_per_s:,.0f}/s")
        time.sleep(_QUIET_S)
    return loads


def _post(system: System, seconds: float) -> wrk.Load:
    return wrk.post(
        system.url, system.folder / system.body, connections=_CONNECTIONS, seconds=seconds
    )


def _ratios(loads: Loads, way: str) -> list[float]:
    pairs = zip(loads[way], loads[OFF], strict=True)
    return [mine.requests_per_s / without.requests_per_s for mine, without in pairs]


def _cost(loads: Loads) -> float:
    return 1 - statistics.median(_ratios(loads, ALL))


def _table(name: str, loads: Loads) -> Table:
    rows = [
        (
            title,
            spread([load.requests_per_s for load in loads[way]]),
            figure(statistics.median(load.p99_ms for load in loads[way]), 1),
            spread(_ratios(loads, way), 3),
        )
        for way, title in _WAYS.items()
    ]
    columns = ("what is logged", "requests/s", "p99 ms", "requests/s ÷ no log")
    return Table(title=f"{name}, 2 versions 90/10", columns=columns, rows=rows)
