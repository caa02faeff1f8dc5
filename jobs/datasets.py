"""Every data set, as a version: found, shown, compared.

    python -m jobs.datasets list
    python -m jobs.datasets show DIGEST --pictures DIR   # counts, statistics, lineage, samples
    python -m jobs.datasets diff A B --pictures DIR      # which rows came, went, moved

Needs storage alone, no Ray and no MLflow. The start of a digest is enough. The last line is JSON;
--json leaves only that on the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.cli import run
from lib.config import Settings
from lib.data import views
from lib.data.manifest import load_manifest
from lib.storage import Storage


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, do it, print it."""
    arguments = _parse(argv)

    def job() -> Mapping[str, Any]:
        return _VERBS[arguments.verb](Storage(Settings.from_env().storage), arguments)

    run(job, only_json=arguments.json)


def _list(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    return views.list_sets(storage)


def _show(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    return views.show_set(storage, load_manifest(storage, asked.digest), asked.pictures)


def _diff(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    a, b = load_manifest(storage, asked.a), load_manifest(storage, asked.b)
    return views.compare_sets(storage, a, b, asked.pictures)


_VERBS = {"list": _list, "show": _show, "diff": _diff}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--json", action="store_true", help="print JSON only")
    parser = argparse.ArgumentParser(
        prog="python -m jobs.datasets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(_VERBS))
    _, show, diff = (verbs.add_parser(verb, parents=[everywhere]) for verb in _VERBS)
    show.add_argument("digest", help="or its start")
    diff.add_argument("a", help="digest, or its start")
    diff.add_argument("b", help="digest, or its start")
    for verb in (show, diff):
        verb.add_argument("--pictures", type=Path, metavar="DIR", help="draw there too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
