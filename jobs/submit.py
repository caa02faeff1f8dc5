"""Submits a job with the record of its code, follows its log, and exits as it does.

    python -m jobs.submit tune --preset full

is `ray job submit --working-dir . -- python -m jobs.tune --preset full` plus git commit, diff and
owner, which Ray would leave behind.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lib import cli
from lib.errors import FAILED, RaylineError


def main(argv: Sequence[str] | None = None) -> None:
    """Submit `jobs.VERB` with its arguments to the line, or to RAY_API_SERVER_ADDRESS."""
    parser = cli.parser("submit", __doc__)
    parser.add_argument("verb", help="a job: ingest, tune, register, deploy, score, pipeline, …")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the job")
    arguments = parser.parse_args(argv)
    if not arguments.verb.isidentifier() or find_spec(f"jobs.{arguments.verb}") is None:
        parser.error(f"there is no jobs/{arguments.verb}.py")
    cli.run(lambda: _submit(arguments), only_json=arguments.json, has_text=True)


def _submit(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import check_model_name
    from lib.line.layout import Line
    from lib.line.source import absolute_paths
    from lib.line.submission import follow, submit_job

    line = Line.from_env(os.environ)
    os.environ.update(line.no_proxy_env(os.environ))
    # The one setting that differs from job to job; the others are the line's.
    model = os.environ.get("RAYLINE_MODEL")
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--model")
    for name in (model, flags.parse_known_args(arguments.arguments)[0].model):
        if name:
            check_model_name(name)
    env = {"RAYLINE_MODEL": model} if model else {}
    words = ["-m", f"jobs.{arguments.verb}", *absolute_paths(arguments.arguments)]
    job_id = submit_job(line, words, env=env)
    try:
        ended = follow(line, job_id)
    except KeyboardInterrupt:
        raise RaylineError(f"the job goes on; stop it with: ray job stop {job_id}") from None
    if ended.status != "SUCCEEDED":
        raise RaylineError(
            f"job {job_id} {ended.status.lower()}",
            ended.result,
            exit_code=ended.result.get("exit_code", FAILED),
        )
    return ended.result


if __name__ == "__main__":
    main()
