"""Brings the whole line up on this machine: Ray, MLflow, Prometheus, and a served model.

    python -m jobs.up --preset quick --data DIR --model NAME

Run again, it starts what is missing or dead, and repeats nothing that is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib import cli
from lib.config import PRESETS
from lib.errors import FAILED, ConfigError, LineError
from lib.line.ports import variables

if TYPE_CHECKING:
    from lib.line.layout import Line
    from lib.line.submission import Ended


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, bring the line up, print where it is."""
    parser = cli.parser("up", __doc__)
    parser.epilog = variables()
    parser.add_argument("--data", default="mnist", help="mnist, a folder, or torchvision:NAME")
    parser.add_argument("--preset", default="quick", choices=sorted(PRESETS))
    parser.add_argument("--model", help="name of the model (default: digits, or after the folder)")
    parser.add_argument(
        "--no-deploy", action="store_true", help="train and register, and write a report"
    )
    arguments = parser.parse_args(argv)
    serve = not arguments.no_deploy
    cli.run(
        lambda: up(arguments.data, arguments.preset, arguments.model, serve=serve),
        only_json=arguments.json,
        has_text=True,
    )


def up(data: str, preset: str, model: str | None, *, serve: bool = True) -> Mapping[str, Any]:
    """Start the parts, run the pipeline, wait until its versions answer; return its result.

    Without `serve` the pipeline ends with the registry, and a report is written.
    """
    from lib.config import check_model_name
    from lib.line.layout import Line
    from lib.line.parts import bring_up
    from lib.line.source import default_model, resolve_source
    from lib.line.summary import await_versions, text, write_report, write_sample

    start = time.monotonic()
    line = Line.from_env(os.environ)
    os.environ.update(line.no_proxy_env(os.environ))
    source = resolve_source(data)
    model = check_model_name(model or _model_of_shell(line, source) or default_model(source))
    bring_up(line)
    if line.recorded_model() is None:
        line.write_settings(model, source)
    job = ["-m", "jobs.pipeline", "--source", source, "--preset", preset, "--model", model]
    result = run_pipeline_job(line, job if serve else [*job, "--no-deploy"]).result
    line.write_settings(model, source)
    if not serve:
        report = write_report(line, result)
        print(f"report: {report}")
        return {**result, "report": str(report)}
    sample = write_sample(line, str(result["data_digest"]))
    await_versions(line, model, sorted(result["weights"]), sample)
    print(text(line, result, sample, seconds=time.monotonic() - start))
    return {**result, "url": line.serve_url, "env": str(line.home / "env")}


def _model_of_shell(line: Line, source: str) -> str | None:
    """Return RAYLINE_MODEL, unless it may only be what the line's env file says of other data."""
    from lib.line.source import default_model

    model = os.environ.get("RAYLINE_MODEL")
    recorded = line.recorded_model()
    if model and recorded and model == recorded[0] and source != recorded[1]:
        raise ConfigError(
            f"RAYLINE_MODEL={model} in this shell is the model of {recorded[1]}, and this is "
            f"{source}: say which model is meant, with MODEL={model} or, of its own, "
            f"MODEL={default_model(source)}"
        )
    return model


def run_pipeline_job(line: Line, arguments: list[str]) -> Ended:
    """Run the pipeline as a Ray job, or follow the one that an earlier `make up` left running."""
    from lib.line.submission import find_running, follow, submit_job

    while running := find_running(line, "jobs.pipeline"):
        job_id, its_arguments = running
        cli.progress("up", f"a pipeline is running already: following job {job_id}")
        ended = follow(line, job_id)
        if its_arguments == arguments and ended.status == "SUCCEEDED":
            return ended
    ended = follow(line, submit_job(line, arguments))
    if ended.status != "SUCCEEDED" or not ended.result:
        said = ended.result.get("message")
        raise LineError(
            f"the pipeline (job {ended.submission_id}) {ended.status.lower()}"
            + (f": {said}" if said else "; what it printed last, above, says why"),
            exit_code=ended.result.get("exit_code", FAILED),
        )
    return ended


if __name__ == "__main__":
    main()
