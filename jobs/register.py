"""Make the best trials of a sweep, or a model from elsewhere, versions of the registered model.

python -m jobs.submit register --sweep RUN_ID
python -m jobs.submit register --sweep RUN_ID --num-versions 1
python -m jobs.submit register --uri models:/theirs/3 --data DIGEST

The URI is that of an MLflow model: ONNX or pt2 from any framework, or scikit-learn with
--trust-code. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import ray

from lib.cli import run
from lib.config import Settings
from lib.data.manifest import load_manifest
from lib.registry.registration import register, register_external
from lib.registry.trials import sweep_data_digest
from lib.storage import Storage


def main() -> None:
    """Parse the flags and register."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.register",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sweep", help="sweep_run_id that jobs.tune printed")
    source.add_argument("--uri", help="runs:/…, models:/… or the folder of an MLflow model")
    parser.add_argument("--num-versions", type=int, default=2, help="of a sweep: trials to take")
    parser.add_argument("--data", help="with --uri: digest of the data set that it is measured on")
    parser.add_argument("--trust-code", action="store_true", help="with --uri: allow pickles")
    arguments = parser.parse_args()
    if bool(arguments.uri) != bool(arguments.data):
        parser.error("--uri and --data belong together; a sweep knows its data set")

    def job() -> dict[str, Any]:
        settings = Settings.from_env()
        storage = Storage(settings.storage)
        digest = arguments.data or sweep_data_digest(settings, arguments.sweep)
        manifest = load_manifest(storage, digest)
        ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        if arguments.uri:
            registered = [
                register_external(
                    settings, storage, manifest, arguments.uri, trust_code=arguments.trust_code
                )
            ]
        else:
            registered = register(
                settings, storage, manifest, arguments.sweep, num_versions=arguments.num_versions
            )
        return {"versions": [version.summary() for version in registered]}

    run(job)


if __name__ == "__main__":
    main()
