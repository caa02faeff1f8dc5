"""The monitor: looks at the prediction log again and again, and says what it saw.

A look tests the windows that have filled since the last one, measures the quality of the last
hour, decides about a retrain, and writes `watch/<model>/state.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from lib.cli import progress
from lib.errors import RaylineError
from lib.serving import policy
from lib.serving.bundle import Card, read_card
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import memory as memories
from lib.watch import quality, triggers
from lib.watch.drift import Reference
from lib.watch.memory import Memory
from lib.watch.reference import load_reference, reference_key
from lib.watch.rows import quality_rows
from lib.watch.sequence import Evidence
from lib.watch.triggers import Decision, Rules, Signs
from lib.watch.windows import Cutting, Tested, test_windows

AWAY = (RaylineError, OSError, pa.ArrowException)
"""What reading the log raises while it, or the storage below it, is away."""
_SERIES_STEPS = 12


class Log(Protocol):
    """The prediction log: `lib.watch.predictions`."""

    def read(
        self, storage: Storage, model: str, *, start_us: int, end_us: int, columns: Any = None
    ) -> pa.Table:
        """Return what was answered, sorted by time."""
        ...

    def joined(self, storage: Storage, model: str, *, start_us: int, end_us: int) -> pa.Table:
        """Return what was answered, with the labels that are known."""
        ...

    def read_labels(self, storage: Storage, model: str, *, start_us: int, end_us: int) -> pa.Table:
        """Return the labels that came."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the monitor looks."""

    cutting: Cutting = field(default_factory=Cutting)
    rules: Rules = field(default_factory=Rules)
    lookback_s: float = 3600.0
    """Of the sliding window that quality is measured in; where the first look begins, too."""
    settle_s: float = 10.0
    """Younger rows are left for the next look: gateways write theirs in batches."""


@dataclass(kw_only=True)
class Monitor:
    """Watches one model. What it must not lose is in files, so it can be killed at any point."""

    storage: Storage
    model: str
    log: Log
    options: Options = field(default_factory=Options)
    retrain: Callable[[str], Any] | None = None
    """Starts a retrain for a reason and returns what names it; None only says when it would."""
    clock: Callable[[], float] = time.time
    _reference: tuple[Any, Reference] | None = field(default=None, init=False)

    def look(self) -> dict[str, Any]:
        """Look once; return what was written to the state."""
        now_s = self.clock()
        state: dict[str, Any] = {"model": self.model, "time": now_s, "paused": {}}
        recalled = memories.recall(self.storage, self.model)
        if recalled:
            state["drift"] = _drift_state(recalled[1])
        served = policy.current(self.storage)
        traffic = served.models.get(self.model) if served else None
        if traffic is None:
            state["paused"]["all"] = f"{self.model} is not served: run jobs.deploy first"
        else:
            card = read_card(self.storage, traffic.bundles[traffic.champion])
            state |= {"champion": traffic.champion, "class_names": list(card.class_names)}
            signs = self._watch(traffic, card, recalled[0] if recalled else None, now_s, state)
            self._act(signs, now_s, state)
        self.storage.write_json(memories.state_path(self.model), state)
        return state

    def _watch(
        self,
        traffic: ModelTraffic,
        card: Card,
        recalled: Memory | None,
        now_s: float,
        state: dict[str, Any],
    ) -> Signs:
        """Fill the state's drift and quality; what can't be looked at is named as paused."""
        signs: dict[str, Any] = {}
        try:
            tested = self._drift(traffic, recalled, now_s)
            if tested:
                state["drift"] = _drift_state(tested)
            shown = state.get("drift")
            is_current = shown and shown["reference"] == self._key(traffic)
            if is_current and shown["evidence"]["alarm"]:
                signs["drift"] = _say_drift(shown)
        except AWAY as error:
            state["paused"]["drift"] = _said(error)
        try:
            state["quality"] = self._quality(card, now_s)
            signs["quality"] = self._fallen(state["quality"], traffic.champion, card)
        except AWAY as error:
            state["paused"]["quality"] = _said(error)
        try:
            signs["new_labels"] = self._new_labels(now_s)
        except AWAY as error:
            state["paused"]["labels"] = _said(error)
        return Signs(**signs)

    def _drift(
        self, traffic: ModelTraffic, recalled: Memory | None, now_s: float
    ) -> dict[str, Any] | None:
        """Test the windows that are full and commit them; None if there is none."""
        now_us = int(now_s * 1e6)
        key = self._key(traffic)
        start_us = now_us - int(self.options.lookback_s * 1e6)
        known = recalled or Memory(
            number=0,
            cursor_us=start_us,
            block_from_us=start_us,
            reference=key,
            evidence=Evidence(),
        )
        if known.reference != key:
            # Evidence that live data differ from the old model's data says nothing of the new one.
            known = Memory(
                number=known.number,
                cursor_us=known.cursor_us,
                block_from_us=known.cursor_us,
                reference=key,
                evidence=Evidence(),
            )
        end_us = now_us - int(self.options.settle_s * 1e6)
        tested: Tested = test_windows(
            known,
            self._load_reference(traffic, key),
            lambda start, end, columns: self.log.read(
                self.storage, self.model, start_us=start, end_us=end, columns=columns
            ),
            self.options.cutting,
            end_us=end_us,
        )
        if not tested.windows:
            return None
        look = {"time": now_s, "windows": tested.windows, "block": tested.block}
        return memories.remember(self.storage, self.model, tested.memory, look)

    def _key(self, traffic: ModelTraffic) -> str:
        return reference_key(self.storage, traffic.bundles, traffic.champion)

    def _load_reference(self, traffic: ModelTraffic, key: str) -> Reference:
        bundles = {
            version: bundle
            for version, bundle in traffic.bundles.items()
            if version == traffic.champion or traffic.weights.get(version)
        }
        name = (key, tuple(sorted(bundles.items())))
        if self._reference is None or self._reference[0] != name:
            found = load_reference(self.storage, bundles, traffic.champion)
            self._reference = (name, found)
        return self._reference[1]

    def _quality(self, card: Card, now_s: float) -> dict[str, Any]:
        end_us, lookback_us = int(now_s * 1e6), int(self.options.lookback_s * 1e6)
        table = self.log.joined(
            self.storage, self.model, start_us=end_us - lookback_us, end_us=end_us
        )
        rows = quality_rows(table)
        num_classes = len(card.class_names)
        step_us = lookback_us // _SERIES_STEPS
        series = [
            {"time": end / 1e6, "versions": [_brief(found) for found in versions]}
            for end, part in quality.sliding(
                rows, width_us=3 * step_us, step_us=step_us, end_us=end_us
            )
            if (versions := quality.by_version(part, num_classes, with_classes=False))
        ]
        return {
            "lookback_s": self.options.lookback_s,
            "rows": table.num_rows,
            "versions": [found.to_json() for found in quality.by_version(rows, num_classes)],
            "disagreement": [found.to_json() for found in quality.disagreements(rows)],
            "series": series,
        }

    def _fallen(self, found: Mapping[str, Any], champion: int, card: Card) -> str | None:
        rules = self.options.rules
        for version in found["versions"]:
            accuracy = quality.Share(**version["accuracy"])
            if version["version"] != champion or version["shadow"] or not accuracy.rows:
                continue
            if quality.is_worse(
                accuracy,
                card.test_accuracy,
                margin=rules.quality_margin,
                confidence=rules.quality_confidence,
            ):
                return (
                    f"version {champion} is right in {accuracy.count} of {accuracy.rows} labelled "
                    f"requests, it was in {100 * card.test_accuracy:.2f} % of the test images"
                )
        return None

    def _new_labels(self, now_s: float) -> int | None:
        if self.options.rules.new_labels is None:
            return None
        started = memories.retrains(self.storage, self.model)
        start_s = started[-1]["time_s"] if started else 0.0
        labels = self.log.read_labels(
            self.storage, self.model, start_us=int(start_s * 1e6), end_us=int(now_s * 1e6)
        )
        return int(labels.num_rows)

    def _act(self, signs: Signs, now_s: float, state: dict[str, Any]) -> None:
        started = memories.retrains(self.storage, self.model)
        times = [float(entry["time_s"]) for entry in started]
        decision = triggers.decide(signs, self.options.rules, times, now_s=now_s)
        state["trigger"] = {**decision.to_json(), "acts": self.retrain is not None}
        if decision.retrain and self.retrain is not None:
            state["trigger"]["started"] = self._start(decision, len(started), now_s)
        state["retrains"] = memories.retrains(self.storage, self.model)[-20:]

    def _start(self, decision: Decision, before: int, now_s: float) -> Any:
        """Claim, then start: killed in between, one cool-down passes without a retrain."""
        assert self.retrain is not None
        entry = {
            "time_s": now_s,
            "reason": decision.reason,
            "triggers": list(decision.triggers),
        }
        if not memories.claim_retrain(self.storage, self.model, before + 1, entry):
            return None
        progress("monitor", f"{self.model}: starting a retrain – {decision.reason}")
        try:
            return self.retrain(decision.reason)
        except AWAY as error:
            progress("monitor", f"{self.model}: the retrain did not start – {_said(error)}")
            return {"error": _said(error)}


def _drift_state(look: Mapping[str, Any]) -> dict[str, Any]:
    """Return what others see of the newest look that tested windows."""
    return {
        "time": look["time"],
        "window": look["windows"][-1],
        "block": look["block"],
        "evidence": look["memory"]["evidence"],
        "reference": look["memory"]["reference"],
        "history": look["memory"]["number"],
    }


def _say_drift(drift: Mapping[str, Any]) -> str:
    window, block = drift["window"], drift["block"]
    worst = window if window["alarm"] or not block else block
    moved = ", ".join(f"{found['what']} {found['distance']:+.2f}" for found in worst["moved"][:3])
    return f"p = {worst['p_value']:.1e}" + (f"; {moved}" if moved else "")


def _brief(found: quality.VersionQuality) -> dict[str, Any]:
    return {
        "version": found.version,
        "shadow": found.shadow,
        "rows": found.rows,
        "labelled": found.accuracy.rows,
        "accuracy": found.accuracy.share,
        "low": found.accuracy.low,
        "high": found.accuracy.high,
        "confidence": found.confidence,
    }


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
