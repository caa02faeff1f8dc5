"""Ingest a data set: images in, Parquet shards and a manifest out.

python -m jobs.ingest
python -m jobs.ingest --source /path/to/images --seed 1
python -m jobs.ingest --source torchvision:FashionMNIST
python -m jobs.ingest --source s3://bucket/scans --group patient --val-fraction 0.2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and ingest."""
    parser = cli.parser("ingest", __doc__)
    parser.add_argument(
        "--source", default="mnist", help="`mnist` (bundled), a folder or URI, or torchvision:NAME"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the validation split")
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="of a Parquet source, such as patient or camera: its rows stay in one split",
    )
    for split in ("val", "test"):
        parser.add_argument(
            f"--{split}-fraction",
            type=float,
            default=0.1,
            help=f"cut from train where the source has no {split} split (default: 0.1)",
        )
    arguments = parser.parse_args(argv)
    cli.run(lambda: _ingest(arguments), only_json=arguments.json)


def _ingest(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.data.assemble import IngestConfig
    from lib.data.ingest import ingest_source
    from lib.ray_session import connect_ray
    from lib.storage import Storage

    settings = Settings.from_env()
    connect_ray()
    ingested = ingest_source(
        Storage(settings.storage),
        arguments.source,
        IngestConfig(
            seed=arguments.seed,
            val_fraction=arguments.val_fraction,
            test_fraction=arguments.test_fraction,
            group=arguments.group,
        ),
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
    main()
