from __future__ import annotations

import numpy as np
import pytest

from lib.data.splits import TEST, TRAIN, VAL, row_hash, split_train, stratified


@pytest.fixture
def labels() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.choice(4, 5_000, p=[0.6, 0.3, 0.08, 0.02]).astype(np.int32)


def test_validation_is_exact_in_every_class(labels: np.ndarray) -> None:
    targets = split_train(
        labels, row_hash(labels.size, 7), seed=0, val_fraction=0.1, test_fraction=None
    )
    for label, count in enumerate(np.bincount(labels)):
        assert (targets[labels == label] == VAL).sum() == np.rint(count * 0.1)
    assert not (targets == TEST).any()


def test_same_seed_same_split_and_another_seed_another(labels: np.ndarray) -> None:
    keys = row_hash(labels.size, 7)
    first, again, other = (
        split_train(labels, keys, seed=seed, val_fraction=0.1, test_fraction=None) == VAL
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    overlap = (first & other).sum() / first.sum()
    assert overlap < 0.2  # A tenth by chance.


def test_chosen_rows_are_spread_over_the_source(labels: np.ndarray) -> None:
    quarters = stratified(labels, 0.2, row_hash(labels.size, 0)).reshape(4, -1).mean(axis=1)
    assert np.all(np.abs(quarters - 0.2) < 0.04)


def test_three_splits_are_disjoint_and_leave_train_something_in_a_class_of_three() -> None:
    labels = np.array([0] * 100 + [1] * 3, np.int32)
    targets = split_train(
        labels, row_hash(labels.size, 7), seed=0, val_fraction=0.1, test_fraction=0.1
    )
    assert sorted(targets[100:].tolist()) == [TRAIN, VAL, TEST]


def test_the_split_follows_the_rows_wherever_they_stand(labels: np.ndarray) -> None:
    keys, order = row_hash(labels.size, 7), np.random.default_rng(0).permutation(labels.size)
    given = {"seed": 3, "val_fraction": 0.1, "test_fraction": 0.2}
    targets = split_train(labels, keys, **given)
    assert np.array_equal(split_train(labels[order], keys[order], **given), targets[order])


def test_equal_rows_are_in_one_split_and_classes_still_get_their_share(labels: np.ndarray) -> None:
    # Every row twice, in the source's order once more.
    keys = np.tile(row_hash(labels.size, 7), 2)
    both = np.tile(labels, 2)
    targets = split_train(both, keys, seed=0, val_fraction=0.1, test_fraction=0.1)
    assert np.array_equal(*targets.reshape(2, -1))
    for label, count in enumerate(np.bincount(both)):
        assert (targets[both == label] == TEST).sum() == pytest.approx(count * 0.1, abs=1.5)
        assert (targets[both == label] == VAL).sum() == pytest.approx(count * 0.09, abs=2)


def test_groups_of_several_classes_are_kept_whole() -> None:
    rng = np.random.default_rng(2)
    groups = rng.integers(0, 200, 6_000)
    labels = ((rng.random(6_000) < 0.1) * (1 + (rng.random(6_000) < 0.3))).astype(np.int32)
    keys = row_hash(200, 9)[groups]
    targets = split_train(labels, keys, seed=0, val_fraction=0.1, test_fraction=None)
    held_out = set(groups[targets == VAL].tolist())
    assert not held_out & set(groups[targets == TRAIN].tolist())
    shares = np.bincount(labels[targets == VAL]) / np.bincount(labels)
    assert np.all((shares > 0.06) & (shares < 0.15)), shares


def test_a_unit_of_most_of_a_class_does_not_take_the_place_of_all_others() -> None:
    for seed in range(20):
        keys = row_hash(101, seed)
        keys[:60] = keys[0]
        chosen = stratified(np.zeros(101, np.int32), 0.1, keys)
        assert chosen.sum() == 10
        assert not chosen[:60].any()
    # One of the two there are must go.
    keys = np.repeat(row_hash(2, 0), (60, 41))
    assert stratified(np.zeros(101, np.int32), 0.1, keys).tolist() == [False] * 60 + [True] * 41


def test_hash_never_changes() -> None:
    # Published data sets were split by these numbers.
    assert row_hash(2, 0).tolist() == [6238072747940578789, 10451216379200822465]
