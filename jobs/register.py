"""Make the best trials of a sweep versions of the registered model.

ray job submit --working-dir . -- python -m jobs.register --sweep RUN_ID
ray job submit --working-dir . -- python -m jobs.register --sweep RUN_ID --num-versions 1

Running it again for the same sweep changes nothing.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import ray

from lib.cli import run
from lib.config import Settings
from lib.data.manifest import load_manifest
from lib.registry.registration import register
from lib.registry.trials import sweep_data_digest
from lib.storage import Storage


def main() -> None:
    """Parse the flags and register."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweep", required=True, help="sweep_run_id that jobs.tune printed")
    parser.add_argument("--num-versions", type=int, default=2, help="how many trials to take")
    arguments = parser.parse_args()

    def job() -> dict[str, Any]:
        settings = Settings.from_env()
        storage = Storage(settings.storage)
        manifest = load_manifest(storage, sweep_data_digest(settings, arguments.sweep))
        ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        registered = register(
            settings, storage, manifest, arguments.sweep, num_versions=arguments.num_versions
        )
        return {"versions": [version.summary() for version in registered]}

    run(job)


if __name__ == "__main__":
    main()
