"""What every job shares: progress lines, one JSON result as the last line, exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lib.errors import RaylineError, RolloutError

_START = time.monotonic()


def progress(step: str, message: str) -> None:
    """Print one line of progress with the seconds since the process started."""
    print(f"[{time.monotonic() - _START:6.1f} s] {step}: {message}", flush=True)


def run(job: Callable[[], Mapping[str, Any]], *, only_json: bool = False) -> NoReturn:
    """Run a job's body, print its result as JSON on the last line of output, and exit.

    With `only_json` all that people read goes to standard error.

    A RaylineError is the user's to act on: it is printed without a traceback, as JSON too, with
    exit code 1. Anything else is a defect and keeps its traceback.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr) if only_json else contextlib.nullcontext():
            result = job()
    except RaylineError as error:
        sys.stderr.flush()
        said = sys.stderr if only_json else sys.stdout
        print(f"{type(error).__name__}: {error}", file=said, flush=True)
        details = error.details if isinstance(error, RolloutError) else {}
        print(
            json.dumps({**details, "error": type(error).__name__, "message": str(error)}),
            flush=True,
        )
        sys.exit(1)
    print(json.dumps(result), flush=True)
    sys.exit(0)
