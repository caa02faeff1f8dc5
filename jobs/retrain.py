"""Train again on what was asked lately and labelled since, and roll the result out if it is better.

python -m jobs.submit retrain
python -m jobs.submit retrain --reason "new camera" --preset full --days 2
python -m jobs.submit retrain --steps 10,50,100 --min-requests 500 --step-timeout 3600  # rollout's
python -m jobs.submit retrain --resume 20261125T094500-1f0c2a
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli
from lib.watch import retrain_asked


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, retrain or go on with a retrain, print its record."""
    parser = cli.parser("retrain", __doc__)
    parser.add_argument("--reason", default="person", help="kept on record and on the version")
    parser.add_argument("--resume", metavar="ID", help="go on with a retrain that was killed")
    retrain_asked.add_arguments(parser)
    arguments = parser.parse_args(argv)
    cli.run(lambda: _retrain(arguments), only_json=arguments.json)


def _retrain(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib import provenance
    from lib.config import Settings, preset
    from lib.ray_session import connect_ray
    from lib.serving.keys import name_of_caller
    from lib.storage import Storage
    from lib.watch import predictions, retrain
    from lib.watch.hand_over import hand_over
    from lib.watch.retrain_record import read
    from lib.watch.retrain_steps import RetrainSteps

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    record = read(storage, settings.model, arguments.resume) if arguments.resume else None
    options = retrain_asked.asked(arguments)
    connect_ray()
    steps = RetrainSteps(
        settings=settings,
        storage=storage,
        preset=preset(str(record.options["preset"]) if record else options.preset),
        joined=predictions.joined,
        rollout_of=hand_over,
    )
    if record:
        return retrain.run(storage, record, steps).to_json()
    caller = name_of_caller(storage, os.environ.get("RAYLINE_API_KEY"))
    who = caller or provenance.current().owner or "unknown"
    return retrain.run_new(
        storage, settings.model, arguments.reason, steps, who=who, options=options
    ).to_json()


if __name__ == "__main__":
    main()
