"""Bring a version to all of the traffic step by step, or back to none of it by itself.

    python -m jobs.rollout 4
    python -m jobs.rollout 4 --steps 5,50,100 --min-requests 500 --step-timeout 3600
    python -m jobs.rollout --resume        # what was interrupted, or had too few requests
    python -m jobs.rollout --abort

It answers logged requests first, then gets copies, then shares of the traffic. Each step has gates
against the champion of the same minutes: errors, p99, and accuracy or, without labels, disagreement
and confidence. A breach takes all requests away at once; the exit code is 0 only for a
promotion, 3 after a breach, 4 when held.
While the log, or Prometheus and without one Ray's metrics, can't be read from here, it pauses.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli
from lib.watch.rollout_state import USUAL_STEPS, Options, read_steps


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, and roll out to the end."""
    parser = cli.parser("rollout", __doc__)
    parser.add_argument("version", type=int, nargs="?", help="the candidate's number")
    parser.add_argument("--steps", default=USUAL_STEPS, help="its shares, in percent")
    parser.add_argument(
        "--min-requests", type=int, default=200, help="answers of it in each step, at least"
    )
    parser.add_argument(
        "--step-timeout", type=float, default=600, help="seconds for a step; then it is held"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the last one")
    parser.add_argument("--abort", action="store_true", help="end it; the champion stays")
    arguments = parser.parse_args(argv)
    if [arguments.version is not None, arguments.resume, arguments.abort].count(True) != 1:
        parser.error("give the number of a version, or --resume, or --abort")
    cli.run(lambda: _roll_out(arguments), only_json=arguments.json)


def _roll_out(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return how it ended."""
    from lib import provenance
    from lib.config import Settings
    from lib.serving.keys import name_of_caller
    from lib.storage import Storage
    from lib.watch import live
    from lib.watch.gauges import connect

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    named = name_of_caller(storage, os.environ.get("RAYLINE_API_KEY"))
    who = named or provenance.current().owner or "unknown"
    if arguments.abort:
        return live.abort(settings, storage, who=who)
    if arguments.resume:
        return live.go_on(settings, storage, who=who, gauges=connect())
    options = Options(
        steps=read_steps(arguments.steps),
        min_requests=arguments.min_requests,
        stage_timeout_s=arguments.step_timeout,
        who=who,
    )
    return live.roll_out(settings, storage, arguments.version, options, gauges=connect())


if __name__ == "__main__":
    main()
