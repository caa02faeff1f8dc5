"""The monitor: looks at the prediction log again and again, and says what it saw.

A look tests the windows that have filled since the last one, measures the quality of the last
hour, decides about a retrain, and writes `watch/<model>/state.json` (see `lib.watch.view`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from lib.cli import progress
from lib.errors import RaylineError
from lib.serving import policy
from lib.serving.bundle import CARD_FILE, Card, read_card
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import memory as memories
from lib.watch import quality, triggers, view
from lib.watch.memory import Memory, Recalled
from lib.watch.monitor_world import Interrupted, Log, Retrains
from lib.watch.populations import Reference
from lib.watch.reference import load_reference, reference_key
from lib.watch.rows import QUALITY_COLUMNS, quality_rows
from lib.watch.sequence import Evidence
from lib.watch.triggers import Decision, Rules, Signs
from lib.watch.windows import Cutting, judge_windows

AWAY = (RaylineError, OSError, pa.ArrowException)
"""What reading the log raises while it, or the storage below it, is away."""
_SERIES = ("end", "rows", "score", "p_value", "alarm")
_SERIES_LOOKS = 240


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
    retrains: Retrains
    interrupted: Interrupted
    acts: bool = False
    """Whether it starts retrains and lets what was killed go on, or only says when it would."""
    options: Options = field(default_factory=Options)
    clock: Callable[[], float] = time.time
    _reference: tuple[Any, Reference] | None = field(default=None, init=False)

    def look(self) -> dict[str, Any]:
        """Look once; return what was written to the state.

        Raises StorageError if the state can't be written; what can't be read is named in it.
        """
        now_s = self.clock()
        state: dict[str, Any] = {"model": self.model, "time": now_s, "paused": {}}
        try:
            served = policy.current(self.storage)
            traffic = served.models.get(self.model) if served else None
            if traffic is None:
                state["paused"]["all"] = f"{self.model} is not served: run jobs.deploy first"
            else:
                self._watch(traffic, now_s, state)
        except AWAY as error:
            state["paused"]["all"] = _said(error)
        self.storage.write_json(memories.state_path(self.model), state)
        return state

    def _watch(self, traffic: ModelTraffic, now_s: float, state: dict[str, Any]) -> None:
        """Fill the state; what can't be looked at is paused, and is no sign of anything."""
        card = read_card(self.storage, traffic.bundles[traffic.champion])
        state |= {
            "champion": traffic.champion,
            "bundles": {str(version): path for version, path in traffic.bundles.items()},
            "class_names": list(card.class_names),
            "test_accuracy": card.test_accuracy,
        }
        recalled = memories.recall(self.storage, self.model)
        look: Mapping[str, Any] | None = recalled[1] if recalled else None
        signs = Signs(trained_s=self._registered_s(traffic))
        try:
            look = self._drift(traffic, recalled, now_s) or look
            if look and look["memory"]["reference"] == self._key(traffic):
                state["drift"] = view.drift_view(look)
                if state["drift"]["alarm"]:
                    signs = replace(signs, drift=view.say_drift(state["drift"]))
        except AWAY as error:
            state["paused"]["drift"] = _said(error)
        try:
            state |= self._quality(traffic, card, now_s, look["series"] if look else [])
            signs = replace(signs, quality=self._fallen(state, card))
            signs = replace(signs, new_labels=self._new_labels(now_s))
        except AWAY as error:
            state["paused"]["quality"] = _said(error)
        if not state["paused"] and not state["rows"] and look is None:
            state["paused"]["log"] = (
                f"no request for {self.model} was logged in the last "
                f"{self.options.lookback_s / 60:.0f} minutes"
            )
        self._decide(signs, now_s, state)

    def _drift(
        self, traffic: ModelTraffic, recalled: Recalled | None, now_s: float
    ) -> dict[str, Any] | None:
        """Test the windows that are full and commit them; None if there is none."""
        key = self._key(traffic)
        known, before = recalled or (self._first(key, now_s), {})
        block = before.get("block")
        if known.reference != key:
            # Evidence that live data differ from the old model's data says nothing of the new one.
            known = replace(
                known, block_from_us=known.cursor_us, reference=key, evidence=Evidence()
            )
            block = None
        tested = judge_windows(
            known,
            self._load_reference(traffic, key),
            partial(self._read, traffic),
            self.options.cutting,
            end_us=int((now_s - self.options.settle_s) * 1e6),
        )
        if not tested.windows:
            return None
        worst = min(tested.windows, key=lambda window: (window["p_value"], -window["score"]))
        series = [*before.get("series", []), {name: worst[name] for name in _SERIES}]
        look = {
            "time": now_s,
            "windows": tested.windows,
            "block": tested.block or block,
            "series": series[-_SERIES_LOOKS:],
        }
        return memories.remember(self.storage, self.model, tested.memory, look)

    def _first(self, key: str, now_s: float) -> Memory:
        start_us = int((now_s - self.options.lookback_s) * 1e6)
        return Memory(
            number=0,
            cursor_us=start_us,
            block_from_us=start_us,
            reference=key,
            evidence=Evidence(),
        )

    def _read(
        self, traffic: ModelTraffic, start_us: int, end_us: int, columns: Sequence[str]
    ) -> pa.Table:
        return self.log.read(
            self.storage,
            self.model,
            start_us=start_us,
            end_us=end_us,
            columns=columns,
            bundles=traffic.bundles,
        )

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

    def _registered_s(self, traffic: ModelTraffic) -> float | None:
        path = f"{traffic.bundles[traffic.champion]}/{CARD_FILE}"
        (info,) = self.storage.infos([path])
        return float(info.mtime.timestamp()) if info.mtime else None

    def _quality(
        self,
        traffic: ModelTraffic,
        card: Card,
        now_s: float,
        series: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        end_us = int(now_s * 1e6)
        start_us = end_us - int(self.options.lookback_s * 1e6)
        rows = quality_rows(
            self.log.joined(
                self.storage,
                self.model,
                start_us=start_us,
                end_us=end_us,
                columns=QUALITY_COLUMNS,
                bundles=traffic.bundles,
            )
        )
        num_classes = len(card.class_names)
        return {
            "lookback_s": self.options.lookback_s,
            **view.quality_view(rows, num_classes),
            "history": view.history_view(
                rows, num_classes, series, start_us=start_us, end_us=end_us
            ),
        }

    def _fallen(self, state: Mapping[str, Any], card: Card) -> str | None:
        rules = self.options.rules
        champion = state["versions"].get(str(state["champion"]))
        if champion is None or champion["shadow"] or not champion["labels"]:
            return None
        right = round(champion["accuracy"] * champion["labels"])
        if not quality.is_worse(
            quality.Share.of(right, champion["labels"]),
            card.test_accuracy,
            margin=rules.quality_margin,
            confidence=rules.quality_confidence,
        ):
            return None
        return (
            f"version {state['champion']} is right in {right:,} of {champion['labels']:,} labelled "
            f"requests, and in {100 * card.test_accuracy:.2f} % of the test images"
        )

    def _new_labels(self, now_s: float) -> int | None:
        if self.options.rules.new_labels is None:
            return None
        started = self.retrains.history()
        start_s = float(started[-1]["started"]) if started else 0.0
        labels = self.log.read_labels(
            self.storage, self.model, start_us=int(start_s * 1e6), end_us=int(now_s * 1e6)
        )
        return int(labels.num_rows)

    def _decide(self, signs: Signs, now_s: float, state: dict[str, Any]) -> None:
        if self.acts:
            state["went_on"] = self._go_on()
        history = self.retrains.history()
        times = [float(entry["started"]) for entry in history]
        decision = triggers.decide(signs, self.options.rules, times, now_s=now_s)
        state["trigger"] = {**decision.to_json(), "acts": self.acts}
        state["retrains"] = [dict(entry) for entry in history[-20:]]
        if decision.retrain and self.acts:
            state["trigger"] |= self._start(decision)

    def _go_on(self) -> str | None:
        try:
            name = self.interrupted.go_on()
        except AWAY as error:
            progress("monitor", f"{self.model}: what was killed does not go on – {_said(error)}")
            return None
        if name:
            progress("monitor", f"{self.model}: {name} was killed and goes on")
        return name

    def _start(self, decision: Decision) -> dict[str, Any]:
        progress("monitor", f"{self.model}: starting a retrain – {decision.reason}")
        try:
            return {"started": self.retrains.start(decision.reason)}
        except AWAY as error:
            progress("monitor", f"{self.model}: the retrain did not start – {_said(error)}")
            return {"not_started": _said(error)}


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
