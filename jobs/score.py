"""Score a folder of images or Parquet files with any version; predictions come as Parquet.

python -m jobs.score --input /path/to/images --output /path/to/predictions
python -m jobs.score --input images.parquet --output s3://bucket/predictions --model-version 3

Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from typing import Any

import ray

from lib import cli
from lib.config import Settings
from lib.registry.models import ensure_bundle, resolve
from lib.score import score
from lib.storage import Storage


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, score, and return what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="folder of PNG/JPEG, Parquet, or a URI")
    parser.add_argument("--output", required=True, help="folder or URI for the predictions")
    parser.add_argument("--model-version", default="champion", help="a number or an alias")
    arguments = parser.parse_args(argv)
    settings = Settings.from_env()
    storage = Storage(settings.storage)
    version = resolve(settings, settings.model, arguments.model_version)
    bundle = ensure_bundle(settings, storage, version)
    cli.progress("score", f"{version.name} version {version.version}")
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    return asdict(score(storage, bundle, arguments.input, arguments.output))


if __name__ == "__main__":
    cli.run(main)
