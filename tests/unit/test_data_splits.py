from __future__ import annotations

import numpy as np
import pytest

from lib.data.splits import TEST, TRAIN, VAL, row_hash, split_train, stratified


@pytest.fixture
def labels() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.choice(4, 5_000, p=[0.6, 0.3, 0.08, 0.02]).astype(np.int32)


def test_validation_is_exact_in_every_class(labels: np.ndarray) -> None:
    targets = split_train(labels, seed=0, val_fraction=0.1, test_fraction=None)
    for label, count in enumerate(np.bincount(labels)):
        assert (targets[labels == label] == VAL).sum() == np.rint(count * 0.1)
    assert not (targets == TEST).any()


def test_same_seed_same_split_and_another_seed_another(labels: np.ndarray) -> None:
    first = stratified(labels, 0.1, 0)
    assert np.array_equal(first, stratified(labels, 0.1, 0))
    overlap = (first & stratified(labels, 0.1, 1)).sum() / first.sum()
    assert overlap < 0.2  # A tenth by chance.


def test_chosen_rows_are_spread_over_the_source(labels: np.ndarray) -> None:
    quarters = stratified(labels, 0.2, 0).reshape(4, -1).mean(axis=1)
    assert np.all(np.abs(quarters - 0.2) < 0.04)


def test_three_splits_are_disjoint_and_leave_train_something_in_a_class_of_three() -> None:
    labels = np.array([0] * 100 + [1] * 3, np.int32)
    targets = split_train(labels, seed=0, val_fraction=0.1, test_fraction=0.1)
    assert sorted(targets[100:].tolist()) == [TRAIN, VAL, TEST]


def test_hash_never_changes() -> None:
    # Published data sets were split by these numbers.
    assert row_hash(2, 0).tolist() == [6238072747940578789, 10451216379200822465]
