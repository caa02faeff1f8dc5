"""Prints what Serve runs now as a patch for a RayService, which must know it to bring it back.

kubectl patch rayservice rayline-serve --type merge -p "$(python -m jobs.serve_config | tail -n 1)"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Print the patch."""
    arguments = cli.parser("serve_config", __doc__).parse_args(argv)
    cli.run(_patch, only_json=arguments.json)


def _patch() -> Mapping[str, Any]:
    """Return the patch; raise ServingError where nothing is served."""
    from lib.config import Settings
    from lib.errors import ServingError
    from lib.serving.client import ServeClient, live_applications
    from lib.serving.plan import GATEWAY, ray_service_patch
    from lib.serving.reach import as_started

    settings = Settings.from_env()
    details = ServeClient(settings).details()
    live = live_applications(details)
    if GATEWAY not in live:
        raise ServingError("there is no gateway yet: run jobs.deploy first")
    return ray_service_patch(as_started(settings, details), live)


if __name__ == "__main__":
    main()
