"""The monitor's state as people read it in a job's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.cli import progress
from lib.tables import print_table


def show(state: Mapping[str, Any]) -> None:
    """Print a state: a line of drift, a table of versions, and what is paused or asked for."""
    model = state["model"]
    for what, why in state["paused"].items():
        progress("monitor", f"{model}: {what} paused – {why}")
    if "drift" in state:
        progress("monitor", f"{model}: {_drift(state['drift'])}")
    if state.get("versions"):
        columns = ("version", "requests", "failed", "labels", "accuracy", "95 %", "confidence")
        rows = [_row(name, version) for name, version in state["versions"].items()]
        print_table(columns, rows, right=columns[1:])
    for pair in state.get("disagreement", []):
        progress(
            "monitor",
            f"{model}: shadow {pair['shadow']} disagrees with version {pair['answered_by']} in "
            f"{_percent(pair['disagreed']['share'])} of {pair['disagreed']['rows']:,} requests",
        )
    trigger = state.get("trigger", {})
    if trigger.get("triggers"):
        verb = "retrain" if trigger["retrain"] else "no retrain"
        hint = "" if trigger["acts"] or not trigger["retrain"] else " (--act would start it)"
        progress("monitor", f"{model}: {verb}{hint} – {trigger['reason']}")


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a state the job's last line holds."""
    names = ("score", "p_value", "alarm", "window_alarm", "moved")
    drift = state.get("drift")
    return {
        "model": state["model"],
        "paused": state["paused"],
        "champion": state.get("champion"),
        "drift": {
            **{name: drift[name] for name in names},
            "windows": drift["evidence"]["windows"],
            "window_alarms": drift["evidence"]["alarms"],
        }
        if drift
        else None,
        "accuracy": {
            name: version["accuracy"] for name, version in state.get("versions", {}).items()
        },
        "trigger": state.get("trigger"),
    }


def _drift(drift: Mapping[str, Any]) -> str:
    evidence = drift["evidence"]
    moved = ", ".join(f"{shift['what']} {shift['distance']:+.2f}" for shift in drift["shifts"][:3])
    verdict = "DRIFT" if drift["alarm"] else "alarm" if drift["window_alarm"] else "no drift"
    strength = max(evidence["sudden"], evidence["slow"])
    return (
        f"{verdict} in {drift['rows']} requests: p = {drift['p_value']:.2g}, score "
        f"{drift['score']:.2f}" + (f" ({moved})" if moved else "") + f"; evidence "
        f"{strength:,.3g} of {evidence['threshold']:,.0f} after {evidence['windows']} windows, "
        f"{evidence['alarms']} with an alarm"
    )


def _row(name: str, version: Mapping[str, Any]) -> tuple[str, ...]:
    has_labels = version["labels"] > 0
    return (
        f"{name} (shadow)" if version["shadow"] else name,
        f"{version['rows']:,}",
        f"{version['failed']:,}",
        f"{version['labels']:,}",
        _percent(version["accuracy"]),
        f"{100 * version['low']:.1f}–{100 * version['high']:.1f}" if has_labels else "–",
        "–" if version["confidence"] is None else f"{version['confidence']:.3f}",
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
