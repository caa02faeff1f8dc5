"""The monitor's state as others read it: `watch/<model>/state.json`.

time, champion, class_names, paused: {what: why}
bundles: {"3": bundle}                                    of the versions that are served
versions: {"3": {accuracy, low, high, labels, rows, failed, confidence, entropy, disagreement,
           class_accuracy, class_shares, shadow}}          over the last `lookback_s`
disagreement: [{shadow, answered_by, disagreed, …}]
drift: {score, p_value, alarm, window_alarm, moved, shifts, heat_map, classes, kinds, evidence,
        block, …}                                          of the newest window
history: [{time, versions, drift}]                         oldest first
trigger: {retrain, triggers, reason}, retrains: […], went_on: what was killed and goes on, or null
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.watch import quality
from lib.watch.quality import Rows, VersionQuality

STEPS = 24
"""Points of the history; each is over three steps."""
_POINT = ("score", "p_value", "alarm")


def drift_view(look: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is shown of a look: its newest window, and the evidence up to it.

    `alarm` is that of the evidence, which may be looked at as often as one likes.
    """
    window, evidence = look["windows"][-1], look["memory"]["evidence"]
    return {
        **window,
        "window_alarm": window["alarm"],
        "alarm": evidence["alarm"],
        "block": look["block"],
        "evidence": evidence,
        "reference": look["memory"]["reference"],
        "history": look["memory"]["number"],
    }


def quality_view(rows: Rows, num_classes: int) -> dict[str, Any]:
    """Return what is shown of the rows of a window."""
    pairs = quality.disagreements(rows)
    versions: dict[str, dict[str, Any]] = {}
    # What a version answered counts more than what it said as a shadow, so it comes last.
    for found in sorted(quality.by_version(rows, num_classes), key=lambda found: not found.shadow):
        versions[str(found.version)] = {
            **_brief(found),
            "shadow": found.shadow,
            "failed": found.failed.count,
            "class_accuracy": [_share(share) for share in found.class_accuracy],
            "class_shares": [round(share, 4) for share in found.class_shares],
        }
    for name, version in versions.items():
        mine = [pair.disagreed for pair in pairs if str(pair.shadow) == name]
        if num := sum(share.rows for share in mine):
            version["disagreement"] = sum(share.count for share in mine) / num
    return {
        "rows": len(rows.time_us_N),
        "versions": versions,
        "disagreement": [pair.to_json() for pair in pairs],
    }


def history_view(
    rows: Rows, num_classes: int, series: Sequence[Mapping[str, Any]], *, start_us: int, end_us: int
) -> list[dict[str, Any]]:
    """Return points over time: quality as it is known now, late labels too, and drift.

    A point has the window of its step that was furthest from the reference.
    """
    step_us = max(1, (end_us - start_us) // STEPS)
    points = []
    for end, part in quality.sliding(rows, width_us=3 * step_us, step_us=step_us, end_us=end_us):
        versions = {
            str(found.version): _brief(found)
            for found in quality.by_version(part, num_classes, with_classes=False)
            if not found.shadow
        }
        its = [one for one in series if end - step_us < one["end"] * 1e6 <= end]
        point: dict[str, Any] = {"time": end / 1e6, "versions": versions}
        if its:
            worst = min(its, key=lambda one: (one["p_value"], -one["score"]))
            point["drift"] = {name: worst[name] for name in _POINT}
        if versions or its:
            points.append(point)
    return points


def say_drift(drift: Mapping[str, Any]) -> str:
    """Return what moved, in one line."""
    block = drift["block"]
    worst = block if block and not drift["window_alarm"] else drift
    moved = ", ".join(f"{shift['what']} {shift['distance']:+.2f}" for shift in worst["shifts"][:3])
    return f"p = {worst['p_value']:.1e}" + (f"; {moved}" if moved else "")


def _brief(found: VersionQuality) -> dict[str, Any]:
    return {
        "rows": found.rows,
        "labels": found.accuracy.rows,
        "accuracy": found.accuracy.share,
        "low": found.accuracy.low,
        "high": found.accuracy.high,
        "confidence": found.confidence,
        "entropy": found.entropy,
    }


def _share(share: quality.Share) -> dict[str, Any]:
    return {
        "accuracy": share.share,
        "low": share.low,
        "high": share.high,
        "labels": share.rows,
    }
