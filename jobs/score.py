"""Score a folder of images or Parquet files with any version; predictions come as Parquet.

python -m jobs.score --input /path/to/images --output /path/to/predictions
python -m jobs.score --input images.parquet --output s3://bucket/predictions --model-version 3

Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and score."""
    parser = cli.parser("score", __doc__)
    parser.add_argument("--input", required=True, help="folder of PNG/JPEG, Parquet, or a URI")
    parser.add_argument("--output", required=True, help="folder or URI for the predictions")
    parser.add_argument("--model-version", default="champion", help="a number or an alias")
    arguments = parser.parse_args(argv)
    cli.run(lambda: _score(arguments), only_json=arguments.json)


def _score(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.ray_session import connect_ray
    from lib.registry.models import ensure_bundle, resolve
    from lib.score import score
    from lib.storage import Storage

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    version = resolve(settings, settings.model, arguments.model_version)
    bundle = ensure_bundle(settings, storage, version)
    cli.progress("score", f"{version.name} version {version.version}")
    connect_ray()
    return asdict(score(storage, bundle, arguments.input, arguments.output))


if __name__ == "__main__":
    main()
