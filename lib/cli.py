"""What every job shares: flags, progress lines, the result, exit codes.

A job prints text for people on a terminal. Elsewhere, as in the log of `ray job submit`, its last
line of output is one JSON object; with `--json` that is all of the output, and text goes to
standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by a gate or check, 4 too
little data or held, 5 something needed is away.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lib.errors import RaylineError
from lib.secrets import UMASK

_START = time.monotonic()
_INTERRUPTED = 130


def progress(step: str, message: str) -> None:
    """Print one line of progress with the seconds since the process started."""
    print(f"[{time.monotonic() - _START:6.1f} s] {step}: {message}", flush=True)


def parser(job: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m jobs.JOB`, described by its module's docstring."""
    made = argparse.ArgumentParser(
        prog=f"python -m jobs.{job}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json_flag(made)
    return made


def add_json_flag(made: argparse.ArgumentParser) -> None:
    """Add `--json`, which `run` reads."""
    made.add_argument("--json", action="store_true", help="print JSON only")


def run(
    job: Callable[[], Mapping[str, Any]], *, only_json: bool = False, has_text: bool = False
) -> NoReturn:
    """Run a job's body, print its result, and exit.

    A RaylineError is the user's to act on: it is printed without a traceback. Anything else is a
    defect and keeps its traceback.

    Args:
        job: Prints its progress, and returns its result.
        only_json: Only JSON goes to standard output.
        has_text: The job has printed its result for people by itself.
    """
    for_people = sys.stdout.isatty() and not only_json
    os.umask(UMASK)
    try:
        try:
            with contextlib.redirect_stdout(sys.stderr) if only_json else contextlib.nullcontext():
                result = job()
        except RaylineError as error:
            _print_error(error, for_people=for_people, only_json=only_json)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as error:
            next_step = str(error) or "the same command goes on from what is there"
            print(f"\ninterrupted; {next_step}", file=sys.stderr)
            sys.exit(_INTERRUPTED)
        if not for_people:
            print(_to_json(result), flush=True)
        elif not has_text:
            # Imported late: most jobs print tables of their own, or none.
            from lib.tables import print_result

            print_result(result)
        sys.exit(0)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has left; nor is there a place for what is
        # flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_error(error: RaylineError, *, for_people: bool, only_json: bool) -> None:
    name = type(error).__name__
    sys.stderr.flush()
    output = sys.stderr if for_people or only_json else sys.stdout
    print(f"{name}: {error}", file=output, flush=True)
    if not for_people:
        content = {"error": name, "message": str(error), "exit_code": error.exit_code}
        print(_to_json({**error.details, **content}), flush=True)


def _to_json(content: Mapping[str, Any]) -> str:
    # Imported late, as above. NaN is no JSON; orjson writes null.
    import orjson

    return json.dumps(orjson.loads(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)))
