"""How people read the registry: tables and lists of what the other modules found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from lib.registry.leaderboard import Board, Entry
from lib.registry.trials import ACCURACY
from lib.tables import print_facts, print_line, print_table, size

_SHORT = 8
"""Letters of a digest, commit or run that tell it from the others."""


def print_board(board: Board, top: int) -> None:
    """Print the best rows of a leaderboard, and what to know beside them."""
    rows = board.entries[:top]
    if not rows:
        print_line(f"{board.model} has no versions: run jobs.tune, then jobs.register")
    else:
        _print_entries(rows, board)
    if len(board.entries) > len(rows):
        print_line(f"{len(board.entries) - len(rows):,} more; --top {len(board.entries)} shows all")
    if any(entry.gap_holds is False for entry in rows):
        print_line("! the gap between validation and test is out of line")
    for note in board.notes:
        print_line(note)
    for other in board.foreign:
        print_line(f"not listed: {other.why}")


def print_best(entry: Entry, board: Board, fetched: str | None) -> None:
    """Print one row of a leaderboard and how to have that model."""
    _print_entries([entry], board)
    if entry.version is None:
        print_line(f"trial {entry.run_id} is no version yet; --fetch DIR registers it and copies")
        print_line("its files to DIR")
        return
    if fetched:
        print_line(f"its files are in {fetched}")
    else:
        print_line(f"have its files:  python -m jobs.models fetch {entry.version} DIR")
    print_line(f"have it serve:   python -m jobs.deploy promote {entry.version}")


def print_description(content: Mapping[str, Any]) -> None:
    """Print all that is known of a version."""
    metrics, gap, data, code = (content[key] for key in ("metrics", "gap", "data", "code"))
    held = {None: "can't be judged", True: "in line", False: "OUT OF LINE"}[gap["holds"]]
    limit = "" if gap["limit"] is None else f", at most {points(gap['limit'])}"
    rates = "; ".join(
        f"{name} " + ", ".join(f"{rate:,.0f} at {batch}" for batch, rate in by_batch.items())
        for name, by_batch in content["runtime"]["images_per_s"].items()
    )
    served, lineage = content["served"], content["lineage"]
    print_facts(
        {
            "version": f"{content['name']} {content['version']}"
            + ("" if content["ready"] else " (registration not complete)"),
            "aliases": ", ".join(content["aliases"]) or "–",
            "made": day(content["created_ms"]),
            "served now": served["now"] or "no",
            "pinned to it": ", ".join(served["pins"]) or "–",
            "validation": percent(metrics["val_accuracy"]),
            "test": percent(metrics["test_accuracy"])
            + f"  (macro F1 {metrics['test_macro_f1']:.4f})",
            "gap": f"{points(gap['value'])} points, {held}{limit}",
            "worst classes": _worst(metrics),
            "images/s": f"{rates}; serves with {content['runtime']['serves']}",
            "data": f"{data['digest'][:_SHORT]}  {data['source'] or '(manifest is gone)'}",
            "rows": _pairs(data["rows"] or {}, "{:,}"),
            "code": commit(code["commit"], code["dirty"]) + f"  by {code['owner'] or 'unknown'}",
            "parameters": _pairs(content["parameters"] or {}),
            "packages": _pairs(content["packages"]),
            "run": lineage["run_id"],
            "sweep": lineage["sweep_run_id"],
            "bundle": served["bundle"] + ("" if served["bundle_is_there"] else " (not published)"),
            "page": lineage["url"],
        }
    )


def print_difference(content: Mapping[str, Any]) -> None:
    """Print what differs between two versions."""
    rows = [
        (section if index == 0 else "", name, _cell(pair["a"]), _cell(pair["b"]), _change(pair))
        for section in ("metrics", "parameters", "sweep", "data", "code", "packages")
        for index, (name, pair) in enumerate(content[section].items())
    ]
    if not rows:
        print_line(f"versions {content['a']} and {content['b']} differ in nothing that is recorded")
        return
    heads = ("", "", f"version {content['a']}", f"version {content['b']}", "change")
    print_table(heads, rows, right=heads[2:])
    if content["diffstat"]:
        print_line(content["diffstat"].rstrip())
    elif "commit" in content["code"]:
        print_line("what changed in the code can't be shown: this checkout lacks the commits")


def print_garbage(content: Mapping[str, Any]) -> None:
    """Print what nothing refers to, and whether it is gone."""
    rows = [
        (found["kind"], found["what"], size(found["bytes"]), found["why"])
        for found in content["garbage"]
    ]
    if rows:
        print_table(("kind", "what", "size", "why"), rows, right=("size",))
    total = f"{len(rows)} things, {size(content['bytes'])}"
    if content["removed"]:
        print_line(f"removed: {total}, but for {len(content['failed'])} that could not be")
    else:
        print_line(f"{total}; nothing was removed: --yes removes them" if rows else "no garbage")
    for note in content["notes"]:
        print_line(note)


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return "–" if share is None else f"{100 * share:.2f} %"


def points(difference: float | None) -> str:
    """Return a difference of shares in percentage points."""
    return "–" if difference is None else f"{100 * difference:+.2f}"


def day(timestamp_ms: int) -> str:
    """Return a time in minutes, where the reader is."""
    return datetime.fromtimestamp(timestamp_ms / 1000).strftime("%Y-%m-%d %H:%M")


def commit(name: str | None, dirty: bool) -> str:
    """Return a commit's short name; `*` says that files differed from it."""
    return f"{name[:_SHORT]}{'*' * dirty}" if name else "–"


def _print_entries(entries: Sequence[Entry], board: Board) -> None:
    with_runs = any(entry.version is None for entry in entries)
    shared = ["#", "version", "alias", "val", "test", "gap"]
    heads = [*shared, *(["run"] if with_runs else ["served"]), "data", "code", "img/s", "made"]
    by_other = board.metric not in (ACCURACY.metric, "test_accuracy")
    if by_other:
        heads.insert(3, f"{board.metric} ▾")
    else:
        heads[3 if board.split == "val" else 4] += " ▾"
    rows = []
    for entry in entries:
        alias = ", ".join(entry.aliases) + ("" if entry.ready else " (unfinished)")
        gap = points(entry.gap) + (" !" if entry.gap_holds is False else "")
        rows.append(
            [
                str(entry.rank or "–"),
                "trial" if entry.version is None else str(entry.version),
                alias,
                *([_cell(entry.score)] if by_other else []),
                percent(entry.score if heads[3] == "val ▾" else entry.val_accuracy),
                percent(entry.test_accuracy),
                gap,
                entry.run_id[:_SHORT] if with_runs else entry.served,
                entry.data_digest[:_SHORT],
                commit(entry.git_commit, entry.git_dirty),
                "–" if entry.images_per_s is None else f"{entry.images_per_s:,.0f}",
                day(entry.created_ms),
            ]
        )
    print_table(heads, rows, right=(heads[0], *heads[3 : 6 + by_other], "img/s"))


def _worst(metrics: Mapping[str, float], count: int = 3) -> str:
    prefix = "test accuracy of "
    found = sorted((value, name) for name, value in metrics.items() if name.startswith(prefix))
    return ", ".join(
        f"{name.removeprefix(prefix)} {percent(value)}" for value, name in found[:count]
    )


def _pairs(values: Mapping[str, Any], form: str = "{}") -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items()) or "–"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "–" if value is None else str(value)


def _change(pair: Mapping[str, Any]) -> str:
    change = pair.get("change")
    if change is None:
        return ""
    return f"{change:+,.0f}" if abs(change) >= 100 else f"{change:+.4f}"
