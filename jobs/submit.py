"""Submits a job with the record of its code, follows its log, and exits as it does.

    python -m jobs.submit tune --preset full

is `ray job submit --working-dir . -- python -m jobs.tune --preset full` plus git commit, diff and
owner, which Ray would leave behind.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from lib.errors import RaylineError
from lib.line.layout import Line
from lib.line.source import absolute_paths
from lib.line.submission import follow, submit_job


def main() -> None:
    """Submit `jobs.VERB` with its arguments to the line, or to RAY_API_SERVER_ADDRESS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("verb", help="a job: ingest, tune, register, deploy, score, pipeline")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the job")
    arguments = parser.parse_args()
    module = f"jobs.{arguments.verb}"
    if not arguments.verb.isidentifier() or find_spec(module) is None:
        parser.error(f"there is no jobs/{arguments.verb}.py")
    try:
        line = Line.from_env(os.environ)
        # The one setting that differs from job to job; the others are the line's.
        model = os.environ.get("RAYLINE_MODEL")
        env = {"RAYLINE_MODEL": model} if model else {}
        job_id = submit_job(line, ["-m", module, *absolute_paths(arguments.arguments)], env=env)
        ended = follow(line, job_id)
    except RaylineError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nthe job goes on; stop it with: ray job stop {job_id}")
    if ended.status != "SUCCEEDED":
        sys.exit(f"job {job_id} {ended.status.lower()}")


if __name__ == "__main__":
    main()
