"""Watch what is served: quality, drift, and whether it is time to train again.

python -m jobs.monitor --once
python -m jobs.monitor --every 30 --act
python -m jobs.monitor --every 30 --act --schedule-h 168 --new-labels 2000
python -m jobs.monitor --every 30 --act --preset full --steps 10,50,100   # of what it starts
python -m jobs.monitor --provision   # dashboards into the Grafana of GRAFANA_URL, GRAFANA_TOKEN

Reads the prediction log, writes watch/<model>/state.json under the storage root. However it ends,
started again it goes on where it was. With --act it starts `jobs.retrain`, within a budget, and
retrains and rollouts whose process was killed go on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli
from lib.watch import retrain_asked
from lib.watch.triggers import Rules


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, look once or again and again."""
    asked = _parse(argv)
    cli.run(lambda: _watch(asked), only_json=asked.json, has_text=not asked.provision)


def _watch(asked: argparse.Namespace) -> Mapping[str, Any]:
    """Return what the last look saw."""
    from lib.config import Settings
    from lib.storage import Storage
    from lib.watch import predictions
    from lib.watch.display import show, summary
    from lib.watch.gauges import connect
    from lib.watch.grafana import GrafanaSettings, provision
    from lib.watch.interrupted import Interrupted
    from lib.watch.monitor import AWAY, Monitor, Options
    from lib.watch.reported import MONITOR, of_monitor
    from lib.watch.retrains import RetrainJobs

    if asked.provision:
        return provision(GrafanaSettings.from_env(os.environ))
    settings = Settings.from_env()
    storage = Storage(settings.storage)
    rules = Rules(
        cool_down_s=asked.cool_down_s,
        schedule_s=asked.schedule_h * 3600 if asked.schedule_h else None,
        new_labels=asked.new_labels,
    )
    monitor = Monitor(
        storage=storage,
        model=settings.model,
        log=predictions,
        retrains=RetrainJobs(settings, storage, retrain_asked.asked(asked)),
        interrupted=Interrupted(settings=settings, storage=storage),
        acts=asked.act,
        options=Options(rules=rules),
    )
    gauges = connect()
    while True:
        start_s = time.monotonic()
        try:
            state = monitor.look()
            show(state)
            if gauges:
                gauges.update(of_monitor(state), instead_of=MONITOR)
        except AWAY as error:
            if asked.once:
                raise
            cli.progress("monitor", f"{settings.model}: nothing could be written – {error}")
        if asked.once:
            return summary(state)
        time.sleep(max(0.0, asked.every - (time.monotonic() - start_s)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser("monitor", __doc__)
    often = parser.add_mutually_exclusive_group(required=True)
    often.add_argument("--once", action="store_true", help="look once")
    often.add_argument("--provision", action="store_true", help="fill Grafana, and look at nothing")
    often.add_argument("--every", type=float, metavar="SECONDS", help="look again and again")
    parser.add_argument("--act", action="store_true", help="start jobs.retrain when it is time")
    parser.add_argument("--cool-down-s", type=float, default=Rules().cool_down_s)
    parser.add_argument("--schedule-h", type=float, help="train again when it was so long ago")
    parser.add_argument("--new-labels", type=int, help="train again for so many new labels")
    retrain_asked.add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
