"""Ends everything that `make up` started, and nothing else. Models, data and runs stay.

python -m jobs.down
"""

from __future__ import annotations

import os
import sys
import time

from lib.errors import RaylineError
from lib.line.layout import Line
from lib.line.parts import take_down


def main() -> None:
    """End the line of RAYLINE_HOME."""
    start = time.monotonic()
    try:
        line = Line.from_env(os.environ)
        num_ended = take_down(line)
    except RaylineError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if not num_ended:
        print(f"nothing of this line was running ({line.home})")
    else:
        print(
            f"ended {num_ended} processes in {time.monotonic() - start:.1f} s; "
            f"models, data and runs stay in {line.home}"
        )


if __name__ == "__main__":
    main()
