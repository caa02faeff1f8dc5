from __future__ import annotations

from typing import Any

import pytest

from lib.watch.triggers import Rules, Signs, decide

HOUR = 3600.0
NOW = 1_000_000.0
DRIFT = Signs(drift="p = 1e-12; edges -0.41")


def test_nothing_asks_nothing_starts() -> None:
    decision = decide(Signs(), Rules(), [], now_s=NOW)
    assert not decision.retrain
    assert decision.triggers == ()


@pytest.mark.parametrize(
    ("signs", "rules", "trigger"),
    [
        (DRIFT, {}, "drift"),
        (Signs(quality="from 99 % to 80 %"), {}, "quality"),
        (Signs(new_labels=500), {"new_labels": 500}, "labels"),
        (Signs(trained_s=NOW - 25 * HOUR), {"schedule_s": 24 * HOUR}, "schedule"),
    ],
)
def test_each_trigger_asks(signs: Signs, rules: dict[str, Any], trigger: str) -> None:
    decision = decide(signs, Rules(**rules), [], now_s=NOW)
    assert decision.retrain
    assert decision.triggers == (trigger,)
    assert trigger in decision.reason


def test_what_was_not_seen_asks_for_nothing() -> None:
    rules = Rules(new_labels=1, schedule_s=1.0)
    assert not decide(Signs(new_labels=None, trained_s=None), rules, [], now_s=NOW).retrain
    assert not decide(Signs(new_labels=499), Rules(new_labels=500), [], now_s=NOW).retrain
    assert not decide(Signs(new_labels=10**6, trained_s=0.0), Rules(), [], now_s=NOW).retrain


def test_the_schedule_counts_from_the_last_retrain() -> None:
    signs, rules = Signs(trained_s=NOW - 99 * HOUR), Rules(schedule_s=24 * HOUR)
    assert not decide(signs, rules, [NOW - 23 * HOUR], now_s=NOW).retrain
    assert decide(signs, rules, [NOW - 25 * HOUR], now_s=NOW).retrain


def test_the_cool_down_holds_back_and_says_so() -> None:
    rules = Rules(cool_down_s=HOUR)
    held = decide(DRIFT, rules, [NOW - HOUR + 1], now_s=NOW)
    assert not held.retrain
    assert held.triggers == ("drift",)
    assert "cool-down" in held.reason
    assert "edges" in held.reason
    assert decide(DRIFT, rules, [NOW - HOUR], now_s=NOW).retrain


def test_the_budget_holds_back_until_retrains_are_old() -> None:
    rules = Rules(cool_down_s=0, budget=2, budget_s=24 * HOUR)
    times = [NOW - 23 * HOUR, NOW - 2 * HOUR]
    held = decide(DRIFT, rules, times, now_s=NOW)
    assert not held.retrain
    assert "budget" in held.reason
    assert decide(DRIFT, rules, times, now_s=NOW + 1.5 * HOUR).retrain
    assert not decide(DRIFT, Rules(budget=0), [], now_s=NOW).retrain


def test_lasting_drift_does_not_thrash() -> None:
    rules, times = Rules(), []
    for second in range(0, 48 * 3600, 30):
        if decide(DRIFT, rules, times, now_s=NOW + second).retrain:
            times.append(NOW + second)
    assert len(times) == 2 * rules.budget
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert min(gaps) >= rules.cool_down_s


@pytest.mark.parametrize(
    "wrong", [{"cool_down_s": -1}, {"budget": -1}, {"budget_s": 0}, {"schedule_s": 0},
              {"new_labels": 0}]
)  # fmt: skip
def test_wrong_rules_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)
