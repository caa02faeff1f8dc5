"""Every data set, as a version: found, shown, compared.

    python -m jobs.datasets list
    python -m jobs.datasets show DIGEST --pictures DIR   # counts, statistics, lineage, samples
    python -m jobs.datasets diff A B --pictures DIR      # which rows came, went, moved
    python -m jobs.datasets extend DIGEST --days 7       # with the labelled requests of that time
    python -m jobs.datasets delete DIGEST                # what would go; --yes deletes it
    python -m jobs.datasets erase ID [ID …]              # a request or a row; --yes erases it

Needs storage alone, no Ray; `delete` and `erase` ask MLflow for versions. The start of a digest is
enough. The last line is JSON; --json leaves only that on the output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import cli

if TYPE_CHECKING:
    from lib.storage import Storage


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, do it, print it."""
    arguments = _parse(argv)

    def job() -> Mapping[str, Any]:
        from lib.config import Settings
        from lib.storage import Storage

        return _VERBS[arguments.verb](Storage(Settings.from_env().storage), arguments)

    cli.run(job, only_json=arguments.json, has_text=True)


def _list(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.data import views

    return views.list_sets(storage)


def _show(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.data import views
    from lib.data.manifest import load_manifest

    return views.show_set(storage, load_manifest(storage, asked.digest), asked.pictures)


def _diff(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.data import views
    from lib.data.manifest import load_manifest

    a, b = load_manifest(storage, asked.a), load_manifest(storage, asked.b)
    return views.compare_sets(storage, a, b, asked.pictures)


def _extend(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.data import views
    from lib.data.extend import ExtendConfig, extend
    from lib.data.manifest import load_manifest
    from lib.watch import predictions
    from lib.watch.labelled import labelled_requests

    parent = load_manifest(storage, asked.digest)
    model = asked.model or Settings.from_env().model
    now_us = int(time.time() * 1e6)
    start_us = now_us - int(asked.days * 86400e6)
    cli.progress("datasets", f"reading the labelled requests to {model} of {asked.days:g} days")
    found = labelled_requests(storage, model, parent, predictions.joined, start_us, now_us)
    made = extend(storage, parent, found, ExtendConfig())
    return views.show_extension(storage, made)


def _delete(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.data import views
    from lib.data.manifest import load_manifest
    from lib.errors import DataError
    from lib.registry.deletion import delete_set

    manifest = load_manifest(storage, asked.digest)
    if not manifest.digest.startswith(asked.digest):
        raise DataError(
            f"{asked.digest} was replaced by {manifest.digest}; delete that by its name"
        )
    return views.show_deletion(delete_set(Settings.from_env(), storage, manifest, remove=asked.yes))


def _erase(storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.data import views
    from lib.watch.erasure import erase

    return views.show_erasure(erase(Settings.from_env(), storage, asked.ids, remove=asked.yes))


_VERBS: Mapping[str, Callable[[Storage, argparse.Namespace], Mapping[str, Any]]] = {
    "list": _list,
    "show": _show,
    "diff": _diff,
    "extend": _extend,
    "delete": _delete,
    "erase": _erase,
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    everywhere = argparse.ArgumentParser(add_help=False)
    cli.add_json_flag(everywhere)
    parser = argparse.ArgumentParser(
        prog="python -m jobs.datasets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(_VERBS))
    _, show, diff, grown, deleted, erased = (
        verbs.add_parser(verb, parents=[everywhere]) for verb in _VERBS
    )
    show.add_argument("digest", help="or its start")
    diff.add_argument("a", help="digest, or its start")
    diff.add_argument("b", help="digest, or its start")
    grown.add_argument("digest", help="or its start")
    grown.add_argument("--days", type=float, default=7, help="of the prediction log (default: 7)")
    grown.add_argument("--model", help="whose requests (default: the one of RAYLINE_MODEL)")
    deleted.add_argument("digest", help="or its start")
    erased.add_argument("ids", nargs="+", metavar="ID", help="of a request, or of a row (32 hex)")
    for verb in (deleted, erased):
        verb.add_argument("--yes", action="store_true", help="do it; else it is only shown")
    for verb in (show, diff):
        verb.add_argument("--pictures", type=Path, metavar="DIR", help="draw there too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
