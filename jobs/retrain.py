"""Train again on what was asked lately and labelled since, and roll the result out if it is better.

python -m jobs.submit retrain
python -m jobs.submit retrain --reason "new camera" --preset full --days 2
python -m jobs.submit retrain --steps 10,50,100 --min-requests 500 --step-timeout 3600  # rollout's
python -m jobs.submit retrain --resume 20261125T094500-1f0c2a
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import ray

from lib import provenance
from lib.cli import run
from lib.config import Settings, preset
from lib.serving.keys import name_of_caller
from lib.storage import Storage
from lib.watch import predictions, retrain, retrain_asked
from lib.watch.hand_over import hand_over
from lib.watch.retrain_record import read
from lib.watch.retrain_steps import RetrainSteps


def main() -> None:
    """Parse the arguments, retrain or go on with a retrain, print its record."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.retrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reason", default="person", help="kept on record and on the version")
    parser.add_argument("--resume", metavar="ID", help="go on with a retrain that was killed")
    retrain_asked.add_arguments(parser)
    arguments = parser.parse_args()

    def job() -> dict[str, Any]:
        settings = Settings.from_env()
        storage = Storage(settings.storage)
        record = read(storage, settings.model, arguments.resume) if arguments.resume else None
        options = retrain_asked.asked(arguments)
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
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

    run(job)


if __name__ == "__main__":
    main()
