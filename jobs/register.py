"""Make the best trials of a sweep, or a model from elsewhere, versions of the registered model.

python -m jobs.submit register --sweep RUN_ID
python -m jobs.submit register --sweep RUN_ID --num-versions 1
python -m jobs.submit register --uri models:/theirs/3 --data DIGEST

The URI is that of an MLflow model: ONNX or pt2 from any framework, or scikit-learn with
--trust-code. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and register."""
    parser = cli.parser("register", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sweep", help="sweep_run_id that jobs.tune printed")
    source.add_argument("--uri", help="runs:/…, models:/… or the folder of an MLflow model")
    parser.add_argument("--num-versions", type=int, default=2, help="of a sweep: trials to take")
    parser.add_argument("--data", help="with --uri: digest of the data set that it is measured on")
    parser.add_argument("--trust-code", action="store_true", help="with --uri: allow pickles")
    arguments = parser.parse_args(argv)
    if bool(arguments.uri) != bool(arguments.data):
        parser.error("--uri and --data belong together; a sweep knows its data set")
    cli.run(lambda: _register(arguments), only_json=arguments.json)


def _register(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.data.manifest import load_manifest
    from lib.ray_session import connect_ray
    from lib.registry.registration import register, register_external
    from lib.registry.trials import sweep_data_digest
    from lib.storage import Storage

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    digest = arguments.data or sweep_data_digest(settings, arguments.sweep)
    manifest = load_manifest(storage, digest)
    connect_ray()
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


if __name__ == "__main__":
    main()
