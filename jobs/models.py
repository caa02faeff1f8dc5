"""Every model, findable and returnable.

    python -m jobs.models best                      # of all finished trials on one data set
    python -m jobs.models best --rank 3 --fetch DIR # the third best, registered if need be
    python -m jobs.models best --sweep RUN_ID       # of one sweep; --data DIGEST, --split test
    python -m jobs.models list --trials             # the leaderboard; --trials: not only versions
    python -m jobs.models show champion             # all that is known of one; a number does too
    python -m jobs.models diff 3 4
    python -m jobs.models fetch 3 DIR               # mlflow.pyfunc.load_model("DIR") loads it
    python -m jobs.models delete 3                  # what would go; --yes removes it
    python -m jobs.models gc                        # what nothing refers to; --yes removes it
    python -m jobs.models gc --keep-trials 3        # and all but a sweep's best checkpoints
    python -m jobs.models delete-sweep SWEEP_RUN_ID # what would go; --yes removes it
    python -m jobs.models backup DIR                # --with-data, --with-keys
    python -m jobs.models restore DIR               # into an empty line

Needs MLflow and storage, not Ray. The last line is JSON; --json leaves only that on the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import cli

if TYPE_CHECKING:
    from lib.config import Settings
    from lib.registry.leaderboard import Board
    from lib.storage import Storage


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, do it, print it."""
    arguments = _parse(argv)

    def job() -> Mapping[str, Any]:
        from lib.config import Settings
        from lib.storage import Storage

        settings = Settings.from_env()
        return _VERBS[arguments.verb](settings, Storage(settings.storage), arguments)

    cli.run(job, only_json=arguments.json, has_text=arguments.verb in _PRINTED)


def _best(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import fetch, leaderboard, views

    if asked.fetch:
        fetch.empty_folder(asked.fetch)
    board = _ranking(settings, storage, asked)
    entry = leaderboard.best(board, asked.rank)
    if asked.fetch and not (entry.version and entry.ready):
        from lib.registry.registration import register_ranked  # It imports torch.

        version = register_ranked(settings, storage, board, entry)
        board = _ranking(settings, storage, asked)
        entry = next(found for found in board.entries if found.version == version.version)
    got = fetch.fetch(settings, str(entry.version), asked.fetch) if asked.fetch else None
    views.print_best(entry, board, got["folder"] if got else None)
    return {
        **entry.to_json(),
        "metric": board.metric,
        "trials": len(board.entries),
        "fetched": got,
    }


def _ranking(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Board:
    from lib.registry.leaderboard import leaderboard

    return leaderboard(
        settings,
        storage,
        split=asked.split,
        data=asked.data,
        sweep=asked.sweep,
        with_trials=asked.split == "val",
        comparable=True,
    )


def _list(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import leaderboard, views

    board = leaderboard.leaderboard(
        settings, storage, split=asked.split, data=asked.data, with_trials=asked.trials
    )
    views.print_board(board, asked.top)
    return board.to_json(asked.top)


def _show(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import inspection, views

    content = inspection.describe(settings, storage, asked.version)
    views.print_description(content)
    return content


def _diff(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import inspection, views

    a, b = (inspection.describe(settings, storage, ref) for ref in (asked.a, asked.b))
    content = inspection.difference(a, b)
    views.print_difference(content)
    return content


def _fetch(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import fetch

    return fetch.fetch(settings, asked.version, asked.folder)


def _delete(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import removal

    return removal.delete(settings, storage, asked.version, remove=asked.yes)


def _gc(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import garbage, views

    content = garbage.collect(settings, storage, remove=asked.yes, keep_trials=asked.keep_trials)
    views.print_garbage(content)
    return content


def _delete_sweep(
    settings: Settings, storage: Storage, asked: argparse.Namespace
) -> Mapping[str, Any]:
    from lib.registry import deletion

    return deletion.delete_sweep(settings, storage, asked.sweep_run_id, remove=asked.yes)


def _backup(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import backup

    return backup.backup(
        settings, storage, asked.folder, with_data=asked.with_data, with_keys=asked.with_keys
    )


def _restore(settings: Settings, storage: Storage, asked: argparse.Namespace) -> Mapping[str, Any]:
    from lib.registry import restore

    return restore.restore(settings, storage, asked.folder)


_VERBS: Mapping[str, Callable[[Settings, Storage, argparse.Namespace], Mapping[str, Any]]] = {
    "best": _best,
    "list": _list,
    "show": _show,
    "diff": _diff,
    "fetch": _fetch,
    "delete": _delete,
    "gc": _gc,
    "delete-sweep": _delete_sweep,
    "backup": _backup,
    "restore": _restore,
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    everywhere = argparse.ArgumentParser(add_help=False)
    cli.add_json_flag(everywhere)
    ranking = argparse.ArgumentParser(add_help=False)
    ranking.add_argument("--split", choices=("val", "test"), default="val")
    ranking.add_argument("--data", metavar="DIGEST", help="of one data set; its start will do")
    parser = argparse.ArgumentParser(
        prog="python -m jobs.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(_VERBS))
    best, listed, show, diff, fetched, deleted, gc, swept, saved, restored = (
        verbs.add_parser(verb, parents=[everywhere, *([ranking] if verb in _RANKED else [])])
        for verb in _VERBS
    )
    best.add_argument("--rank", type=int, default=1, help="1 is the best")
    best.add_argument("--sweep", metavar="RUN_ID", help="of the trials of one sweep alone")
    best.add_argument(
        "--fetch", type=Path, metavar="DIR", help="register it if need be, copy its files there"
    )
    listed.add_argument("--trials", action="store_true", help="trials that are no versions too")
    listed.add_argument("--top", type=int, default=30, help="how many rows")
    for verb in (show, fetched, deleted):
        verb.add_argument("version", help="a number or an alias")
    diff.add_argument("a", help="a number or an alias")
    diff.add_argument("b", help="a number or an alias")
    for verb in (fetched, saved, restored):
        verb.add_argument("folder", type=Path, metavar="DIR")
    deleted.add_argument("--yes", action="store_true", help="delete it")
    gc.add_argument("--yes", action="store_true", help="remove what was found")
    gc.add_argument(
        "--keep-trials",
        type=int,
        metavar="N",
        help="keep the checkpoints of a sweep's N best trials and of versions alone",
    )
    swept.add_argument("sweep_run_id", help="that jobs.tune printed")
    swept.add_argument("--yes", action="store_true", help="delete it")
    saved.add_argument("--with-data", action="store_true", help="the images too")
    saved.add_argument(
        "--with-keys",
        action="store_true",
        help="keys.json too: hashes of API keys, and the line's own key",
    )
    return parser.parse_args(argv)


_RANKED = ("best", "list")
_PRINTED = ("best", "list", "show", "diff", "gc")
"""Verbs that print their result for people by themselves."""

if __name__ == "__main__":
    main()
