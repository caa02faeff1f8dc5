"""Search for the best model of a data set.

python -m jobs.submit tune --data DIGEST
python -m jobs.submit tune --data DIGEST --preset smoke --seed 1
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
from lib.storage import Storage
from lib.train.search import run_sweep


def main() -> None:
    """Parse the arguments, run the sweep, print its result."""
    parser = argparse.ArgumentParser(description="Search for the best model of a data set.")
    parser.add_argument("--data", required=True, help="digest that jobs.ingest printed")
    parser.add_argument("--preset", default="quick", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0, help="of the sampler and of training")
    arguments = parser.parse_args()

    def job() -> dict[str, Any]:
        settings = Settings.from_env()
        storage = Storage(settings.storage)
        manifest = load_manifest(storage, arguments.data)
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
        sweep = run_sweep(
            settings, storage, manifest, replace(preset(arguments.preset), seed=arguments.seed)
        )
        best = sweep.trials[0]
        return {
            "sweep_run_id": sweep.sweep_run_id,
            "data_digest": manifest.digest,
            "trials": len(sweep.trials),
            "failed_trials": sweep.num_failed,
            "best": {
                "run_id": best.run_id,
                "val_accuracy": best.val_accuracy,
                "epoch": best.epoch,
                "params": dict(best.params),
            },
            "seconds": round(sweep.seconds, 1),
            "images_per_s": round(sweep.images_per_s),
        }

    cli.run(job)


if __name__ == "__main__":
    main()
