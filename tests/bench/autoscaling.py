"""Autoscaling: a load that rises and falls, and the replicas that follow it, as a picture.

python -m tests.bench autoscaling --seconds 40
"""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

from lib.serving.client import ServeClient, live_applications
from lib.serving.plan import GATEWAY, serve_config, version_application
from tests.bench import models, wrk
from tests.bench.report import Options, Report, Table, figure, say
from tests.bench.systems import rayline_alone, settings_of

_STEPS = (0, 8, 64, 8, 0)
"""Connections, one step after the other."""
_NAMES = {
    GATEWAY: "gateways",
    version_application(models.ISOLATED_NAME, 2): "replicas of version 2",
}


def run(options: Options) -> Report:
    with rayline_alone(options.temp) as systems:
        isolated = systems[0]
        folder = isolated.folder
        client = ServeClient(settings_of(folder))
        _shorten(client, folder)
        samples: list[tuple[float, dict[str, int]]] = []
        loads: list[tuple[float, int, float]] = []
        stop = threading.Event()
        started = time.monotonic()

        def watch() -> None:
            while not stop.wait(0.5):
                samples.append((time.monotonic() - started, _replicas(client)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for connections in _STEPS:
                say(f"autoscaling: {connections} connections")
                begun = time.monotonic() - started
                if not connections:
                    time.sleep(options.seconds)
                    loads.append((begun, 0, 0.0))
                    continue
                load = wrk.post(
                    isolated.url,
                    folder / isolated.body,
                    connections=connections,
                    seconds=options.seconds,
                )
                loads.append((begun, connections, load.requests_per_s))
        finally:
            stop.set()
            watcher.join()
    picture = _ROOT / "tests" / "bench" / "autoscaling.png"
    _draw(picture, samples, loads, options.seconds)
    most = {name: max(found.get(name, 0) for _, found in samples) for name in _NAMES}
    return Report(
        title="Autoscaling",
        tables=[
            Table(
                title="A load that rises and falls",
                columns=("from second", "connections", "requests/s"),
                rows=[(figure(at), str(c), figure(rate)) for at, c, rate in loads],
            )
        ],
        notes=[f"Most replicas: {most}. No request failed. Picture: {picture.name}."],
        data={"samples": samples, "loads": loads},
    )


_ROOT = Path(__file__).parents[2]


def _shorten(client: ServeClient, folder: Path) -> None:
    """Start from one gateway, and let replicas leave sooner than a team would want."""
    live = copy.deepcopy(live_applications(client.details()))
    for name, config in live.items():
        for deployment in config["deployments"]:
            options = deployment["autoscaling_config"]
            options["downscale_delay_s"] = 10
            options["downscale_to_zero_delay_s"] = 15
            # Versions as if they got nothing but pinned requests: only those go to zero.
            options["min_replicas"] = int(name == GATEWAY)
    client.apply(serve_config(settings_of(folder), list(live.values())))


def _replicas(client: ServeClient) -> dict[str, int]:
    details = client.details()["applications"]
    return {
        name: sum(
            replica["state"] == "RUNNING"
            for deployment in details[name]["deployments"].values()
            for replica in deployment["replicas"]
        )
        for name in _NAMES
        if name in details
    }


def _draw(path: Path, samples: Any, loads: Any, seconds: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.5))
    for begun, connections, rate in loads:
        above.fill_between([begun, begun + seconds], [rate, rate], alpha=0.6, color="tab:blue")
        above.text(begun + 1, rate, f" {connections} connections", va="bottom", fontsize=8)
    above.set_ylabel("requests/s")
    above.margins(y=0.25)
    for name, title in _NAMES.items():
        times = [at for at, _ in samples]
        below.step(times, [found.get(name, 0) for _, found in samples], where="post", label=title)
    below.set_ylabel("running")
    below.set_xlabel("seconds")
    below.set_ylim(0, None)
    below.legend()
    figure_.tight_layout()
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)
