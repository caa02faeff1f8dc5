"""Ends everything that `make up` started, and nothing else. Models, data and runs stay.

python -m jobs.down
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """End the line of RAYLINE_HOME."""
    arguments = cli.parser("down", __doc__).parse_args(argv)
    cli.run(_down, only_json=arguments.json, has_text=True)


def _down() -> Mapping[str, Any]:
    from lib.line.layout import Line
    from lib.line.parts import take_down

    start = time.monotonic()
    line = Line.from_env(os.environ)
    num_ended = take_down(line)
    seconds = round(time.monotonic() - start, 1)
    if not num_ended:
        print(f"nothing of this line was running ({line.home})")
    else:
        print(
            f"ended {num_ended} processes in {seconds} s; models, data and runs stay in {line.home}"
        )
    return {"ended": num_ended, "seconds": seconds, "home": str(line.home)}


if __name__ == "__main__":
    main()
