"""Write all that is known of a version into one HTML file, with its scorecard.

python -m jobs.report champion
python -m jobs.report 3 --out report.html
python -m jobs.report 3 --attest data-privacy --note "bucket is private, 30 days kept: checked"

Runs in the project's checkout, not as a submitted job: the scorecard looks at tests and CI too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and write the page."""
    parser = cli.parser("report", __doc__)
    parser.add_argument("version", nargs="?", default="champion", help="a number or an alias")
    parser.add_argument("--out", type=Path, help="file (default: .rayline/reports/MODEL-vN.html)")
    parser.add_argument("--attest", metavar="CHECK", help="put a check done by hand on record")
    parser.add_argument("--note", help="with --attest: what was done, and what was found")
    arguments = parser.parse_args(argv)
    if bool(arguments.attest) != bool(arguments.note):
        parser.error("--attest and --note belong together")
    cli.run(lambda: _report(arguments), only_json=arguments.json, has_text=True)


def _report(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib import provenance
    from lib.config import Settings
    from lib.errors import ConfigError
    from lib.line.layout import PROJECT_ROOT, Line
    from lib.serving.keys import name_of_caller
    from lib.storage import Storage
    from lib.watch import predictions, scorecard
    from lib.watch.collect import collect
    from lib.watch.dossier import attest
    from lib.watch.report.page import render

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    if arguments.attest:
        known = [check.id for check in scorecard.CHECKS]
        if arguments.attest not in known:
            raise ConfigError(f"no check {arguments.attest!r}; there is: {', '.join(known)}")
        named = name_of_caller(storage, os.environ.get("RAYLINE_API_KEY"))
        who = named or provenance.current().owner or "unknown"
        attest(storage, settings.model, arguments.attest, who=who, note=arguments.note)
    found = collect(
        settings, storage, arguments.version, root=PROJECT_ROOT, read_log=predictions.read
    )
    card = scorecard.score(found)
    reports = Line.from_env(os.environ).home / "reports"
    out = arguments.out or reports / f"{found.model}-v{found.version}.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(found, card), encoding="utf-8")
    cli.progress("report", f"{out.resolve()}; ML Test Score {card.score:g}: {card.meaning}")
    return {"version": found.version, "file": str(out.resolve()), **card.to_json()}


if __name__ == "__main__":
    main()
