"""Who uses what: the slots of every sweep on the cluster, by owner.

    python -m jobs.leases

Slots come free as trials end, and go to the owner who holds fewest; RAYLINE_OWNER_LIMITS (as
ann=2,*=4) is the most that one may hold, RAYLINE_SERVE_CPUS what no trial takes from serving. The
last line is JSON; --json leaves only that on the output.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from lib.cli import run
from lib.errors import LineError
from lib.leases.lender import look
from lib.leases.usage import print_usage, usage


def main(argv: Sequence[str] | None = None) -> None:
    """Look, print it."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.leases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    arguments = parser.parse_args(argv)

    def job() -> Mapping[str, Any]:
        _connect()
        used = usage(look(), ray.cluster_resources())
        print_usage(used)
        return used

    run(job, only_json=arguments.json)


def _connect() -> None:
    """Connect to the cluster; never start one, whose answer would be that nobody uses it."""
    try:
        ray.init(
            address="auto",
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LineError(
            f"no Ray is reached from here ({error}); run `. .rayline/env` first, or submit it: "
            "python -m jobs.submit leases"
        ) from error


if __name__ == "__main__":
    main()
