"""The generalisation guard and the challenger's gate, as pure rules."""

from __future__ import annotations

import numpy as np
import pytest

from lib.registry.gaps import (
    FALSE_ALARM_RATE,
    MIN_HISTORY,
    Scores,
    Verdict,
    judge,
    judge_all,
    last_that_held,
    too_weak_to_challenge,
    way_back,
)
from lib.registry.registration import choose_aliases

ROWS = {"val_rows": 5_000, "test_rows": 10_000}


def scores(val: float, test: float) -> Scores:
    return Scores(val_accuracy=val, test_accuracy=test)


@pytest.mark.parametrize(
    ("accuracy", "val_rows", "test_rows"), [(0.995, 5_000, 10_000), (0.9, 300, 1_000)]
)
@pytest.mark.parametrize("num_before", [1, MIN_HISTORY + 1])
def test_honest_models_are_refused_about_as_rarely_as_said(
    accuracy: float, val_rows: int, test_rows: int, num_before: int
) -> None:
    random, tries = np.random.default_rng(0), 20_000
    val = random.binomial(val_rows, accuracy, (tries, num_before + 1)) / val_rows
    test = random.binomial(test_rows, accuracy, (tries, num_before + 1)) / test_rows
    refused = 0
    for vals, tests in zip(val.tolist(), test.tolist(), strict=True):
        *before, candidate = (scores(v, t) for v, t in zip(vals, tests, strict=True))
        verdict = judge(candidate, before, val_rows=val_rows, test_rows=test_rows)
        refused += not verdict.holds
    assert refused / tries <= 5 * FALSE_ALARM_RATE


def test_a_model_that_learned_the_validation_rows_is_out_of_line() -> None:
    before = [scores(0.995, 0.994), scores(0.996, 0.995)]
    assert judge(scores(0.997, 0.995), before, **ROWS).holds
    verdict = judge(scores(0.9999, 0.985), before, **ROWS)
    assert not verdict.holds
    assert verdict.num_before == 2
    assert "promised +1.49 points more" in verdict.explain()
    # Better on test than promised is nothing to refuse.
    assert judge(scores(0.985, 0.999), before, **ROWS).holds


def test_a_test_split_that_is_harder_for_every_version_is_the_usual_case() -> None:
    harder = [scores(0.99, 0.95 + 0.001 * i) for i in range(4)]
    assert not judge(scores(0.99, 0.951), [], **ROWS).holds
    assert judge(scores(0.99, 0.951), harder, **ROWS).holds
    assert not judge(scores(0.99, 0.92), harder, **ROWS).holds


def test_rows_that_scatter_more_than_counts_widen_the_line_once_that_is_known() -> None:
    wild = [scores(0.9, 0.9 - gap) for gap in (-0.06, 0.05, -0.04, 0.06, 0.0, 0.07)]
    candidate = scores(0.9, 0.83)
    assert not judge(candidate, wild[: MIN_HISTORY - 1], **ROWS).holds
    assert judge(candidate, wild, **ROWS).holds


def test_every_version_is_judged_by_the_earlier_ones_alone() -> None:
    history = {1: scores(0.99, 0.989), 2: scores(0.99, 0.95), 4: scores(0.99, 0.988)}
    verdicts = judge_all(history, **ROWS)
    assert {number: verdict.holds for number, verdict in verdicts.items()} == {
        1: True,
        2: False,
        4: True,
    }
    assert [verdict.num_before for verdict in verdicts.values()] == [0, 1, 2]
    assert last_that_held(verdicts) == 4


def test_the_way_back_is_the_command_that_restores_the_last_version_that_held() -> None:
    def verdict(holds: bool) -> Verdict:
        return Verdict(gap=0.0 if holds else 1.0, usual=0.0, limit=0.5, num_before=1)

    verdicts = {1: verdict(True), 2: verdict(True), 3: verdict(False)}
    assert "held is 2: `python -m jobs.deploy promote 2` restores it" in way_back(verdicts, 3, 1)
    assert "`python -m jobs.deploy rollback`" in way_back(verdicts, 3, 2)
    assert way_back(verdicts, 2, 1) == "version 2, the champion, whose gap held, serves on"
    assert "champion, whose gap held, serves on; the last" in way_back(verdicts, 1, None)
    assert "promote 2" in way_back(verdicts, None, None)
    assert "no version's gap held" in way_back({3: verdict(False)}, 3, None)


def test_a_challenger_may_lose_half_a_point_beyond_chance() -> None:
    assert too_weak_to_challenge(0.994, 0.995, 10_000) is None
    assert too_weak_to_challenge(0.999, 0.995, 10_000) is None
    why = too_weak_to_challenge(0.985, 0.995, 10_000)
    assert why is not None
    assert "1.00 points below" in why
    # On few rows a point is chance.
    assert too_weak_to_challenge(0.985, 0.995, 500) is None


def test_a_weak_version_challenges_nobody_but_the_next_best_does() -> None:
    assert choose_aliases([3, 4], 1, weak={3}) == {"challenger": 4}
    assert choose_aliases([3], 1, weak={3}) == {}
    assert choose_aliases([1, 2], None, weak={2}) == {"champion": 1}
