"""Whether to train again now: what asks for it, and the budget and cool-down that hold it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

DRIFT = "drift"
QUALITY = "quality"
LABELS = "labels"
SCHEDULE = "schedule"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """When to train again by itself; None switches a trigger off."""

    cool_down_s: float = 3600.0
    """From the start of one retrain to that of the next, whatever asks for it."""
    budget: int = 4
    """Retrains at most in `budget_s`."""
    budget_s: float = 24 * 3600.0
    schedule_s: float | None = None
    """Age of the newest training at which to train again."""
    new_labels: int | None = None
    """Labelled requests since the last retrain that are worth one."""
    quality_margin: float = 0.02
    """Accuracy below that on the test split which is not called fallen."""
    quality_confidence: float = 0.999
    """Of the claim that the accuracy has fallen by more."""

    def __post_init__(self) -> None:
        """Refuse rules that would train without end or never."""
        if self.cool_down_s < 0 or self.budget < 0 or self.budget_s <= 0:
            raise ValueError(f"cool_down_s, budget and budget_s must not be negative: {self}")
        if self.schedule_s is not None and self.schedule_s <= 0:
            raise ValueError(f"schedule_s={self.schedule_s} must be positive")
        if self.new_labels is not None and self.new_labels < 1:
            raise ValueError(f"new_labels={self.new_labels} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Signs:
    """What the monitor saw; None is "not seen" or "could not be looked at"."""

    drift: str | None = None
    """What moved, if evidence of drift passed its threshold."""
    quality: str | None = None
    """By how much the champion's accuracy fell, if it did."""
    new_labels: int | None = None
    """Labelled requests since the last retrain."""
    trained_s: float | None = None
    """Unix time at which the champion came to be, if it is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether to train again, and why or why not."""

    retrain: bool
    triggers: tuple[str, ...]
    """What asks for it."""
    reason: str
    """For people: what was seen, and what holds it back if something does."""

    def to_json(self) -> dict[str, Any]:
        """Return the decision as JSON types."""
        return {**asdict(self), "triggers": list(self.triggers)}


def decide(signs: Signs, rules: Rules, started_s: Sequence[float], *, now_s: float) -> Decision:
    """Decide; `started_s` are the Unix times at which retrains were started before."""
    asking = _asking(signs, rules, started_s, now_s)
    triggers = tuple(asking)
    if not asking:
        return Decision(retrain=False, triggers=(), reason="nothing asks for it")
    seen = "; ".join(f"{name}: {why}" for name, why in asking.items())
    held = _held(rules, started_s, now_s)
    if held:
        return Decision(retrain=False, triggers=triggers, reason=f"{seen} – held back: {held}")
    return Decision(retrain=True, triggers=triggers, reason=seen)


def _asking(signs: Signs, rules: Rules, started_s: Sequence[float], now_s: float) -> dict[str, str]:
    asking = {}
    if signs.drift:
        asking[DRIFT] = signs.drift
    if signs.quality:
        asking[QUALITY] = signs.quality
    wanted = rules.new_labels
    if wanted is not None and signs.new_labels is not None and signs.new_labels >= wanted:
        asking[LABELS] = f"{signs.new_labels:,} new labelled requests, {wanted:,} are asked for"
    times = [*started_s, *([signs.trained_s] if signs.trained_s is not None else [])]
    if rules.schedule_s is not None and times and now_s - max(times) >= rules.schedule_s:
        asking[SCHEDULE] = f"the last training was {(now_s - max(times)) / 3600:.1f} h ago"
    return asking


def _held(rules: Rules, started_s: Sequence[float], now_s: float) -> str | None:
    if started_s and (waited_s := now_s - max(started_s)) < rules.cool_down_s:
        return (
            f"the last retrain started {max(0.0, waited_s):.0f} s ago, the cool-down is "
            f"{rules.cool_down_s:.0f} s"
        )
    recent = sum(now_s - at_s < rules.budget_s for at_s in started_s)
    if recent >= rules.budget:
        return f"{recent} retrains in {rules.budget_s / 3600:.0f} h, the budget is {rules.budget}"
    return None
