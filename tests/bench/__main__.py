"""Measures Rayline beside its peers; tables go to standard output, all figures to a JSON file.

python -m tests.bench [ingest] [training] [search] [serving] --rounds 5 --seconds 3 --json FILE
python -m tests.bench soak --seconds 600
python -m tests.bench autoscaling --seconds 40
python -m tests.bench backpressure --seconds 10
python -m tests.bench large --rows 7000000
python -m tests.bench watching --rounds 10 --seconds 6
python -m tests.bench scale
python -m tests.bench replicas --rounds 3 --seconds 5
python -m tests.bench full --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("ingest", "training", "search", "serving")
"""What is measured if nothing is named."""
LONG_PARTS = (
    "soak",
    "autoscaling",
    "backpressure",
    "watching",
    "large",
    "scale",
    "replicas",
    "full",
)
_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the parts; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        help=f"default: {', '.join(PARTS)}; by name alone: {', '.join(LONG_PARTS)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each measurement is repeated")
    parser.add_argument("--seconds", type=float, default=3, help="length of one load of serving")
    parser.add_argument("--rows", type=int, default=7_000_000, help="images of the large set")
    parser.add_argument("--json", type=Path, help="where all figures go (default: .rayline/bench/)")
    arguments = parser.parse_args()
    there = (*PARTS, *LONG_PARTS)
    chosen = [part for part in there if part in arguments.parts] or list(PARTS)
    if unknown := set(arguments.parts) - set(there):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose of {', '.join(there)}")
    if arguments.rounds < 1 or arguments.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    if arguments.rows < 10_000:
        parser.error("--rows must be at least 10000, or nothing is large")
    # Ended from outside, the bench still ends all that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    temp = Path(tempfile.mkdtemp(prefix="rlb-", dir="/tmp"))
    try:
        _isolate(temp)
        return _run(chosen, arguments, temp)
    except KeyboardInterrupt:
        print("stopped; everything that the bench started is ended", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _isolate(temp: Path) -> None:
    """Keep away from a line that is up and the user's token, before Ray is imported."""
    for name in list(os.environ):
        if name.startswith(("RAYLINE_", "RAY_", "MLFLOW_")):
            del os.environ[name]
    token = temp / "auth_token"
    token.write_text(os.urandom(32).hex())
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAYLINE_OBJECT_STORE_BYTES": str(500 * 2**20),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }


def _run(chosen: list[str], arguments: argparse.Namespace, temp: Path) -> int:
    from lib.errors import RaylineError
    from tests.bench import machine
    from tests.bench.report import BenchError, Options, say

    options = Options(
        rounds=arguments.rounds, seconds=arguments.seconds, rows=arguments.rows, temp=temp
    )
    found = machine.describe()
    target = (
        arguments.json or _ROOT / ".rayline" / "bench" / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    print(machine.markdown(found), flush=True)
    say(f"measuring {', '.join(chosen)}: about {_minutes(chosen, options):.0f} minutes on 2 cores")
    if found["load_average_1_min"] > 0.5:
        say(
            f"WARNING: the load average is {found['load_average_1_min']:.1f}: something else is "
            "running, and the figures will be worse than they are"
        )
    content: dict[str, Any] = {"machine": found, "rounds": options.rounds, "parts": {}}
    for part in chosen:
        try:
            report = _quietly(part, options, target.with_suffix(".log"))
        except (BenchError, RaylineError) as error:
            say(f"{part} FAILED: {error}")
            return 1
        print(report.markdown(), flush=True)
        content["parts"][part] = report.data
        target.write_text(json.dumps(content, indent=2) + "\n")
    say(f"all figures: {target}")
    return 0


def _quietly(part: str, options: Any, log: Path) -> Any:
    """Run a part; what libraries print goes to a log, not between the tables."""
    with log.open("a") as output, contextlib.redirect_stdout(output):
        return importlib.import_module(f"tests.bench.{part}").run(options)


def _minutes(chosen: list[str], options: Any) -> float:
    # Start and end of heads and servers, then rounds; measured on two cores.
    seconds = {
        "ingest": 20 + 5 * 4,
        "training": 420 + max(5, options.rounds) * 35,
        "search": 100 + options.rounds * 340,
        "soak": 60 + options.seconds,
        "autoscaling": 60 + 5 * options.seconds,
        "backpressure": 60 + 4 * (options.seconds + 2),
        "large": 60 + options.rows / 15_000,
        "watching": 150 + options.rounds * 6 * (options.seconds + 5),
        "scale": 60,
        "replicas": options.rounds * (15 + 6 * (options.seconds + 1)),
        "full": 60 + options.rounds * 1800,
        "serving": 150 + options.rounds * 24 * (options.seconds + 2),
    }
    return sum(seconds[part] for part in chosen) / 60


if __name__ == "__main__":
    sys.exit(main())
