"""Serve the model's champion and challenger.

    python -m jobs.deploy
    python -m jobs.deploy --challenger-share 5 --why "first day of version 3"

What is served already goes on unchanged; running it again changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lib import provenance
from lib.cli import run
from lib.config import Settings
from lib.serving.deploy import CHALLENGER_SHARE, deploy
from lib.storage import Storage


def main() -> Mapping[str, Any]:
    """Parse, deploy, and return the policy in force."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--challenger-share",
        type=float,
        default=CHALLENGER_SHARE,
        help="percent of the requests that the challenger answers",
    )
    parser.add_argument("--why", default="jobs.deploy", help="kept in the policy's history")
    arguments = parser.parse_args()
    settings = Settings.from_env()
    return deploy(
        settings,
        Storage(settings.storage),
        who=provenance.current().owner or "unknown",
        why=arguments.why,
        challenger_share=arguments.challenger_share,
    )


if __name__ == "__main__":
    run(main)
