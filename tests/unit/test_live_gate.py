from __future__ import annotations

import numpy as np
import pytest

from lib.watch.live_gate import FALSE_PASS_RATE, judge


def answers(right: np.ndarray) -> np.ndarray:
    return np.where(right, 1, 0)


def test_a_candidate_that_fixes_much_passes() -> None:
    labels = np.ones(40, dtype=np.int64)
    found = judge(labels, answers(np.arange(40) < 36), answers(np.arange(40) < 10))
    assert found.passed
    assert (found.num_fixed, found.num_broken) == (26, 0)
    assert found.p_value == pytest.approx(2.0**-26)
    assert "better than the champion on 40" in found.explain()


def test_equal_and_worse_do_not_pass() -> None:
    labels = np.ones(40, dtype=np.int64)
    some = answers(np.arange(40) < 30)
    assert judge(labels, some, some).p_value == 1.0
    assert not judge(labels, some, some).passed
    assert not judge(labels, some, answers(np.arange(40) < 35)).passed
    assert "not shown" in judge(labels, some, some).explain()


def test_too_few_differing_rows_do_not_pass() -> None:
    labels = np.ones(40, dtype=np.int64)
    champion = answers(np.arange(40) < 36)
    assert not judge(labels, np.ones(40, dtype=np.int64), champion).passed  # 4 fixed: p = 1/16
    champion[:1] = 0
    assert judge(labels, np.ones(40, dtype=np.int64), champion).passed  # 5 fixed: p = 1/32


def test_no_better_a_candidate_passes_no_more_often_than_stated() -> None:
    random = np.random.default_rng(0)
    labels = np.ones(60, dtype=np.int64)
    passed = sum(
        judge(labels, answers(random.random(60) < 0.8), answers(random.random(60) < 0.8)).passed
        for _ in range(2000)
    )
    assert passed <= 2000 * FALSE_PASS_RATE * 1.2


def test_no_rows_judge_nothing() -> None:
    empty = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="no held-out rows"):
        judge(empty, empty, empty)
