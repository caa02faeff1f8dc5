"""Ingest a data set: images in, Parquet shards and a manifest out.

python -m jobs.ingest
python -m jobs.ingest --source /path/to/images --seed 1
python -m jobs.ingest --source torchvision:FashionMNIST
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from typing import Any

import ray

from lib import cli
from lib.config import Settings
from lib.data.assemble import IngestConfig
from lib.data.ingest import ingest_source
from lib.storage import Storage


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the arguments, ingest, and return what was made."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.ingest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", default="mnist", help="`mnist` (bundled), a folder or URI, or torchvision:NAME"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the validation split")
    arguments = parser.parse_args(argv)
    settings = Settings.from_env()
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    ingested = ingest_source(
        Storage(settings.storage), arguments.source, IngestConfig(seed=arguments.seed)
    )
    manifest = ingested.manifest
    return {
        "digest": manifest.digest,
        "rows": {split: manifest.rows(split) for split in manifest.counts},
        "classes": list(manifest.class_names),
        "shape": list(manifest.shape),
        "seconds": round(ingested.seconds, 3),
        "images_per_s": round(ingested.images_per_s),
        "reused": ingested.reused,
        "ignored": [asdict(ignored) for ignored in ingested.ignored],
    }


if __name__ == "__main__":
    cli.run(main)
