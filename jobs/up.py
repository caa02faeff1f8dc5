"""Brings the whole line up on this machine: Ray, MLflow, Prometheus, and a served model.

    python -m jobs.up --preset quick --data DIR --model NAME

Run again, it starts what is missing or dead, and repeats nothing that is done.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from lib.cli import progress
from lib.config import PRESETS
from lib.errors import LineError, RaylineError
from lib.line.layout import Line
from lib.line.parts import bring_up
from lib.line.ports import variables
from lib.line.source import default_model, resolve_source
from lib.line.submission import Ended, find_running, follow, submit_job
from lib.line.summary import await_versions, text, write_report, write_sample


def main() -> None:
    """Parse the flags, bring the line up, print where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog=variables(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="mnist", help="mnist, a folder, or torchvision:NAME")
    parser.add_argument("--preset", default="quick", choices=sorted(PRESETS))
    parser.add_argument("--model", help="name of the model (default: digits, or after the folder)")
    parser.add_argument(
        "--no-deploy", action="store_true", help="train and register, and write a report"
    )
    arguments = parser.parse_args()
    model = arguments.model or os.environ.get("RAYLINE_MODEL")
    try:
        up(arguments.data, arguments.preset, model, serve=not arguments.no_deploy)
    except RaylineError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped here; `make up` goes on from what is there, `make down` ends it")


def up(data: str, preset: str, model: str | None, *, serve: bool = True) -> None:
    """Start the parts, run the pipeline, wait until its versions answer.

    Without `serve` the pipeline ends with the registry, and a report is written.
    """
    start = time.monotonic()
    line = Line.from_env(os.environ)
    source = resolve_source(data)
    model = model or default_model(source)
    line.prepare()
    bring_up(line)
    job = ["-m", "jobs.pipeline", "--source", source, "--preset", preset, "--model", model]
    ended = run_pipeline_job(line, job if serve else [*job, "--no-deploy"])
    if not serve:
        print(f"report: {write_report(line, ended.result)}")
        return
    sample = write_sample(line, str(ended.result["data_digest"]))
    await_versions(line, model, sorted(ended.result["weights"]), sample)
    print(text(line, ended.result, sample, seconds=time.monotonic() - start))


def run_pipeline_job(line: Line, arguments: list[str]) -> Ended:
    """Run the pipeline as a Ray job, or follow the one that an earlier `make up` left running."""
    while running := find_running(line, "jobs.pipeline"):
        job_id, its_arguments = running
        progress("up", f"a pipeline is running already: following job {job_id}")
        ended = follow(line, job_id)
        if its_arguments == arguments and ended.status == "SUCCEEDED":
            return ended
    ended = follow(line, submit_job(line, arguments))
    if ended.status != "SUCCEEDED" or not ended.result:
        said = ended.result.get("message")
        raise LineError(
            f"the pipeline (job {ended.submission_id}) {ended.status.lower()}"
            + (f": {said}" if said else "; what it printed last, above, says why")
        )
    return ended


if __name__ == "__main__":
    main()
