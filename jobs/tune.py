"""Search for the best model of a data set.

python -m jobs.submit tune --data DIGEST
python -m jobs.submit tune --data DIGEST --preset full --search gp/asha --seed 1
python -m jobs.submit tune --resume SWEEP_RUN_ID
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Any

import ray

from lib import cli
from lib.config import PRESETS, Settings, preset
from lib.data.manifest import load_manifest
from lib.errors import ConfigError
from lib.storage import Storage
from lib.train.experiment import Experiment
from lib.train.presets import preset_experiment
from lib.train.search import resume_sweep, run_sweep
from lib.train.work import Work, image_work


def main() -> None:
    """Parse the arguments, run or resume the sweep, print its result."""
    parser = argparse.ArgumentParser(description="Search for the best model of a data set.")
    parser.add_argument("--data", help="digest that jobs.ingest printed")
    parser.add_argument("--preset", default="quick", choices=sorted(PRESETS))
    parser.add_argument(
        "--search",
        default="tpe/asha",
        metavar="SAMPLER[/SCHEDULER]",
        help="random, grid, sobol, tpe, cmaes or gp / asha, hyperband, medianstopping, pbt or none",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampler and of training")
    parser.add_argument("--resume", metavar="SWEEP_RUN_ID", help="go on with a sweep that ended")
    arguments = parser.parse_args()

    def job() -> dict[str, Any]:
        settings = Settings.from_env()
        storage = Storage(settings.storage)
        if not arguments.resume:
            experiment, work = experiment_from(arguments, storage)
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
        if arguments.resume:
            return resume_sweep(settings, storage, arguments.resume).summary()
        return run_sweep(settings, storage, experiment, work).summary()

    cli.run(job)


def experiment_from(arguments: argparse.Namespace, storage: Storage) -> tuple[Experiment, Work]:
    """Return what is to be searched and what trials do; raise ConfigError if it is not said."""
    if not arguments.data:
        raise ConfigError("give --data DIGEST, or --resume SWEEP_RUN_ID")
    chosen = replace(preset(arguments.preset), seed=arguments.seed)
    sampler, _, scheduler = arguments.search.partition("/")
    experiment = preset_experiment(chosen, sampler=sampler, scheduler=scheduler or "asha")
    return experiment, image_work(
        storage, load_manifest(storage, arguments.data), chosen, experiment
    )


if __name__ == "__main__":
    main()
