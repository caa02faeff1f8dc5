"""The whole line from images to a served model, as one job; `make up` submits it.

ray job submit --working-dir . -- python -m jobs.pipeline --preset quick
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from typing import Any

import ray

from lib import provenance
from lib.cli import run
from lib.config import PRESETS, Settings, preset
from lib.pipeline import run_pipeline
from lib.storage import Storage


def main() -> None:
    """Parse the flags and run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--source", default="mnist", help="mnist, a folder on the cluster, or torchvision:NAME"
    )
    parser.add_argument("--preset", default="quick", choices=sorted(PRESETS))
    parser.add_argument("--model", help="name of the registered model (else RAYLINE_MODEL)")
    parser.add_argument(
        "--no-deploy", action="store_true", help="register, but change nothing that is served"
    )
    arguments = parser.parse_args()

    def job() -> dict[str, Any]:
        settings = Settings.from_env()
        if arguments.model:
            settings = dataclasses.replace(settings, model=arguments.model)
        submitted = provenance.current()
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
        return run_pipeline(
            settings,
            Storage(settings.storage),
            arguments.source,
            preset(arguments.preset),
            who=submitted.owner or "unknown",
            serve=not arguments.no_deploy,
        )

    run(job)


if __name__ == "__main__":
    main()
