from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from lib.watch import quality
from lib.watch.quality import FAILED, NO_LABEL, Rows, Share


def rows(**columns: Any) -> Rows:
    num = len(columns["predicted"])
    given: dict[str, Any] = {
        "image_id": [f"r{row}/0" for row in range(num)],
        "time_us": np.arange(num) * 1_000_000,
        "version": [1] * num,
        "shadow": [False] * num,
        "confidence": [0.9] * num,
        "entropy": [0.1] * num,
        "label": [NO_LABEL] * num,
        **columns,
    }
    kinds = {"image_id": object, "time_us": np.int64, "shadow": np.bool_}
    kinds |= {"confidence": np.float32, "entropy": np.float32}
    return Rows(
        **{
            f"{name}_N": np.array(values, dtype=kinds.get(name, np.int32))
            for name, values in given.items()
        }
    )


def test_wilsons_interval_is_known() -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998: 81 of 263.
    low, high = quality.wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    for count, num in ((0, 20), (20, 20), (1, 1), (985, 1000)):
        known = stats.binomtest(count, num).proportion_ci(0.99, method="wilson")
        assert quality.wilson(count, num, 0.99) == pytest.approx((known.low, known.high))
    assert quality.wilson(0, 20)[0] == 0
    assert quality.wilson(20, 20)[1] == 1
    assert Share.of(0, 0) == Share(count=0, rows=0, share=None, low=None, high=None)


def test_accuracy_is_of_labelled_rows_per_version_and_class() -> None:
    found = quality.by_version(
        rows(
            predicted=[0, 1, 1, 0, 2, 0],
            label=[0, 1, 0, NO_LABEL, 2, NO_LABEL],
            version=[1, 1, 1, 1, 2, 2],
        ),
        3,
    )
    one, two = found
    assert (one.version, one.rows, one.accuracy.count, one.accuracy.rows) == (1, 4, 2, 3)
    assert one.accuracy.low is not None
    assert one.accuracy.low < 2 / 3 < (one.accuracy.high or 0)
    assert [share.rows for share in one.class_accuracy] == [2, 1, 0]
    assert one.class_accuracy[0].share == 0.5
    assert one.class_accuracy[2].share is None
    assert one.class_shares == (0.5, 0.5, 0)
    assert (two.version, two.accuracy.share) == (2, 1.0)


def test_failed_rows_are_counted_and_are_wrong() -> None:
    (found,) = quality.by_version(
        rows(
            predicted=[0, FAILED],
            label=[0, 0],
            confidence=[0.8, np.nan],
            entropy=[0.2, np.nan],
        ),
        2,
    )
    assert (found.failed.count, found.accuracy.share) == (1, 0.5)
    assert found.confidence == pytest.approx(0.8)
    assert found.class_shares == (1.0, 0.0)


def test_a_version_that_always_fails_has_no_confidence() -> None:
    (found,) = quality.by_version(rows(predicted=[FAILED] * 3, confidence=[np.nan] * 3), 2)
    assert (found.confidence, found.entropy, found.class_shares) == (None, None, (0.0, 0.0))


def test_shadows_are_compared_with_what_callers_got() -> None:
    logged = rows(
        image_id=["a/0", "b/0", "c/0", "a/0", "b/0", "c/0", "gone/0"],
        predicted=[0, 1, FAILED, 0, 2, 0, 1],
        version=[1, 1, 1, 5, 5, 5, 5],
        shadow=[False] * 3 + [True] * 4,
        label=[0, 2, NO_LABEL, 0, 2, NO_LABEL, NO_LABEL],
    )
    (pair,) = quality.disagreements(logged)
    assert (pair.shadow, pair.answered_by) == (5, 1)
    assert (pair.disagreed.count, pair.disagreed.rows) == (1, 2)
    assert (pair.shadow_accuracy.share, pair.answered_accuracy.share) == (1.0, 0.5)
    kinds = [(found.version, found.shadow) for found in quality.by_version(logged, 3)]
    assert kinds == [(1, False), (5, True)]


def test_without_shadows_nothing_is_compared() -> None:
    assert quality.disagreements(rows(predicted=[1, 2])) == []
    assert quality.disagreements(rows(predicted=[])) == []
    assert quality.by_version(rows(predicted=[]), 3) == []


def test_windows_slide_and_hold_what_is_in_their_time() -> None:
    logged = rows(predicted=np.zeros(100, int))
    second = 1_000_000
    windows = list(
        quality.sliding(logged, width_us=30 * second, step_us=10 * second, end_us=99 * second)
    )
    assert [end // second for end, _ in windows] == list(range(9, 100, 10))
    assert [len(part.time_us_N) for _, part in windows] == [10, 20] + [30] * 8
    assert list(quality.sliding(rows(predicted=[]), width_us=1, step_us=1, end_us=5)) == []


def test_accuracy_is_fallen_only_beyond_chance_and_margin() -> None:
    given: dict[str, float] = {"margin": 0.02, "confidence": 0.999}
    assert quality.is_worse(Share.of(850, 1000), 0.99, **given)
    assert not quality.is_worse(Share.of(965, 1000), 0.99, **given)
    assert not quality.is_worse(Share.of(8, 10), 0.99, **given)
    assert not quality.is_worse(Share.of(0, 0), 0.99, **given)
    # By chance, an accuracy at the margin is called fallen in one of a thousand windows.
    rng = np.random.default_rng(0)
    said = [
        quality.is_worse(Share.of(int(count), 500), 0.92, **given)
        for count in rng.binomial(500, 0.9, 1000)
    ]
    assert sum(said) <= 4
