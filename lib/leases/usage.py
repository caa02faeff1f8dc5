"""Who uses what of a cluster: every owner's sweeps, their slots, and what is left to serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.tables import print_line, print_table

_COLUMNS = ("owner", "sweep", "slots", "running", "wants", "limit", "CPU", "GPU", "since")
_NUMBERS = _COLUMNS[2:]
_KINDS = ("CPU", "GPU")


def usage(seen: Mapping[str, Any] | None, total: Mapping[str, float]) -> dict[str, Any]:
    """Return who uses what, as JSON types.

    Args:
        seen: What `lib.leases.lender.look` returned.
        total: All resources of the cluster.
    """
    leases = seen["leases"] if seen else []
    room = (seen["room"] if seen else None) or {}
    owners: dict[str, dict[str, int]] = {}
    for lease in leases:
        owner = owners.setdefault(lease["owner"], {"sweeps": 0, "slots": 0, "wants": 0})
        owner["sweeps"] += 1
        owner["slots"] += lease["slots"]
        owner["wants"] += lease["wants"]
    kinds = {
        kind: {
            "total": total.get(kind, 0.0),
            "for_trials": room.get(kind),
            "in_trials": _in_trials(leases, kind),
        }
        for kind in _KINDS
    }
    return {"owners": owners, "leases": leases, **{k.lower(): v for k, v in kinds.items()}}


def print_usage(used: Mapping[str, Any]) -> None:
    """Print who uses what, for people."""
    leases = used["leases"]
    if not leases:
        print_line("no sweep runs or waits for a slot")
        return
    rows = sorted(leases, key=lambda lease: (lease["owner"], -lease["seconds"]))
    print_table(_COLUMNS, [_row(lease) for lease in rows], right=_NUMBERS)
    for kind in ("cpu", "gpu"):
        amounts = used[kind]
        if not amounts["total"] or amounts["for_trials"] is None:
            continue
        print_line(
            f"{kind.upper()}s: {amounts['total']:g} in all, {amounts['for_trials']:g} for trials, "
            f"of which {amounts['in_trials']:g} in use; the rest is serving's and other jobs'"
        )


def _row(lease: Mapping[str, Any]) -> list[str]:
    trial = lease["trial"]
    return [
        lease["owner"],
        lease["sweep"],
        str(lease["slots"]),
        str(lease["running"]),
        str(lease["wants"]),
        "" if lease["limit"] is None else str(lease["limit"]),
        *(f"{trial[kind] * lease['running']:g}" if kind in trial else "" for kind in _KINDS),
        f"{lease['seconds'] / 60:.0f} min",
    ]


def _in_trials(leases: list[Mapping[str, Any]], kind: str) -> float:
    return sum(lease["trial"].get(kind, 0.0) * lease["running"] for lease in leases)
