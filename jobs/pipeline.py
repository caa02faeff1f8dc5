"""The whole line from images to a served model, as one job; `make up` submits it.

ray job submit --working-dir . -- python -m jobs.pipeline --preset quick
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli
from lib.config import PRESETS, Settings, preset


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the pipeline."""
    parser = cli.parser("pipeline", __doc__)
    parser.add_argument(
        "--source", default="mnist", help="mnist, a folder on the cluster, or torchvision:NAME"
    )
    parser.add_argument("--preset", default="quick", choices=sorted(PRESETS))
    parser.add_argument("--model", help="name of the registered model (else RAYLINE_MODEL)")
    parser.add_argument(
        "--no-deploy", action="store_true", help="register, but change nothing that is served"
    )
    arguments = parser.parse_args(argv)
    cli.run(lambda: _run(arguments), only_json=arguments.json)


def _run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib import provenance
    from lib.pipeline import run_pipeline
    from lib.ray_session import connect_ray
    from lib.storage import Storage

    settings = Settings.from_env()
    if arguments.model:
        settings = dataclasses.replace(settings, model=arguments.model)
    submitted = provenance.current()
    connect_ray()
    return run_pipeline(
        settings,
        Storage(settings.storage),
        arguments.source,
        preset(arguments.preset),
        who=submitted.owner or "unknown",
        serve=not arguments.no_deploy,
    )


if __name__ == "__main__":
    main()
