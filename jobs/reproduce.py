"""Rebuild a version from its record and prove that it is the same.

python -m jobs.reproduce 3
python -m jobs.reproduce champion --rebuild-env

Runs in the project's git checkout, not as a submitted job: Ray leaves the history behind. Ends
with exit code 3 if the result differs by more than noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, train again, print the verdict."""
    parser = cli.parser("reproduce", __doc__)
    parser.add_argument("version", help="a number or an alias")
    parser.add_argument("--this-code", action="store_true", help="not the recorded commit")
    parser.add_argument("--this-env", action="store_true", help="even if torch differs")
    parser.add_argument("--rebuild-env", action="store_true", help="recorded packages, in a venv")
    parser.add_argument(
        "--trust-diff", action="store_true", help="run uncommitted changes known from MLflow alone"
    )
    arguments = parser.parse_args(argv)
    cli.run(lambda: _reproduce(arguments), only_json=arguments.json)


def _reproduce(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.errors import RefusedError
    from lib.line.layout import PROJECT_ROOT
    from lib.registry.models import resolve
    from lib.registry.reproduce import How, reproduce
    from lib.registry.verdict import DIFFERS
    from lib.storage import Storage

    settings = Settings.from_env()
    found = reproduce(
        settings,
        Storage(settings.storage),
        resolve(settings, settings.model, arguments.version),
        root=PROJECT_ROOT,
        how=How(
            this_code=arguments.this_code,
            this_env=arguments.this_env,
            rebuild_env=arguments.rebuild_env,
            trust_diff=arguments.trust_diff,
        ),
    )
    cli.progress("reproduce", found.describe())
    if found.verdict == DIFFERS:
        raise RefusedError(found.describe(), details=found.summary())
    return found.summary()


if __name__ == "__main__":
    main()
