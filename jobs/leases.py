"""Who uses what: the slots of every sweep on the cluster, by owner.

    python -m jobs.leases

Slots come free as trials end, and go to the owner who holds fewest; RAYLINE_OWNER_LIMITS (as
ann=2,*=4) is the most that one may hold, RAYLINE_SERVE_CPUS what no trial takes from serving. The
last line is JSON; --json leaves only that on the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Print who uses what."""
    arguments = cli.parser("leases", __doc__).parse_args(argv)
    cli.run(_usage, only_json=arguments.json, has_text=True)


def _usage() -> Mapping[str, Any]:
    import ray

    from lib.leases.lender import look
    from lib.leases.usage import print_usage, usage
    from lib.ray_session import connect_ray

    # A Ray of its own would show that no client uses it.
    connect_ray(may_start=False)
    used = usage(look(), ray.cluster_resources())
    print_usage(used)
    return used


if __name__ == "__main__":
    main()
