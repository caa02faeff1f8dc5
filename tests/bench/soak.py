"""Soak: full load for as long as `--seconds` says; the memory of gateways and versions over time.

python -m tests.bench soak --seconds 600
"""

from __future__ import annotations

import re
import threading
import time

import psutil

from tests.bench import wrk
from tests.bench.report import Options, Report, Table, figure, say
from tests.bench.systems import System, rayline_alone

_CONNECTIONS = 64
_EVERY_S = 2.0
_WARM_SHARE = 0.1
"""Of the time: what is allocated once is allocated then."""


def run(options: Options) -> Report:
    with rayline_alone(options.temp) as systems:
        # Isolated: gateways and versions both work.
        load, memory = _soak(systems[0], options)
        rows = [
            (
                name,
                figure(min(readings)),
                figure(max(readings)),
                f"{readings[-1] / readings[0] - 1:+.1%}",
            )
            for name, readings in sorted(memory.items())
        ]
    return Report(
        title="Soak",
        tables=[
            Table(
                title=f"Resident memory under {options.seconds:g} s of full load",
                columns=("", "least MiB", "most MiB", "end against start"),
                rows=rows,
            )
        ],
        notes=[
            f"{load.requests:,} requests from {_CONNECTIONS} connections, none failed; memory is "
            "read after a tenth of the time."
        ],
        data={"requests": load.requests, "mib": memory},
    )


def _soak(system: System, options: Options) -> tuple[wrk.Load, dict[str, list[float]]]:
    say(f"soak: {system.name} for {options.seconds:g} s")
    memory: dict[str, list[float]] = {}
    stop = threading.Event()

    def watch() -> None:
        stop.wait(options.seconds * _WARM_SHARE)
        while not stop.wait(_EVERY_S):
            for name, mib in _memory(system).items():
                memory.setdefault(name, []).append(mib)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        load = wrk.post(
            system.url,
            system.folder / system.body,
            connections=_CONNECTIONS,
            seconds=options.seconds,
        )
    finally:
        stop.set()
        watcher.join()
    say(f"soak: {load.requests:,} requests in {time.monotonic() - started:.0f} s")
    return load, memory


def _memory(system: System) -> dict[str, float]:
    """Return MiB of the replicas, by application and process."""
    found = {}
    for process in system.processes():
        try:
            title = " ".join(process.cmdline())
            replica = re.search(r"ServeReplica:([^:\s]+)", title)
            if replica:
                found[f"{replica[1]} ({process.pid})"] = process.memory_info().rss / 2**20
        except psutil.Error:
            continue
    return found
