"""Which rows go to train, val and test: exact per class, the same for the same seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lib.data.checks import Labels

TRAIN, VAL, TEST = 0, 1, 2
"""Index into `manifest.SPLITS`."""

Targets = npt.NDArray[np.uint8]


def row_hash(num_rows: int, seed: int) -> npt.NDArray[np.uint64]:
    """Return a hash per row number (splitmix64).

    An own hash: a generator of a library may give other numbers in its next version, and the
    same data would then be split otherwise.
    """
    start = np.array([(seed * 0xD1342543DE82EF95 + 1) % 2**64], dtype=np.uint64)
    mixed = np.arange(num_rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def stratified(labels: Labels, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose `fraction` of the rows of every class, rounded, at least one and not all."""
    counts = np.bincount(labels)
    wanted = np.minimum(np.maximum(np.rint(counts * fraction), 1), np.maximum(counts - 1, 0))
    hashes = row_hash(labels.size, seed)
    chosen = np.zeros(labels.size, dtype=np.bool_)
    # Hashes of different rows differ, so the smallest are the same in whatever order.
    by_class = np.argsort(
        labels.astype(np.uint16) if counts.size <= 2**16 else labels, kind="stable"
    )
    for rows, num in zip(
        np.split(by_class, np.cumsum(counts)[:-1]), wanted.astype(int), strict=True
    ):
        if num:
            chosen[rows[np.argpartition(hashes[rows], num - 1)[:num]]] = True
    return chosen


def split_train(
    labels: Labels, *, seed: int, val_fraction: float | None, test_fraction: float | None
) -> Targets:
    """Assign each row of a source's train split; None takes nothing out for that split."""
    targets = np.full(labels.size, TRAIN, dtype=np.uint8)
    if test_fraction is not None:
        targets[stratified(labels, test_fraction, seed)] = TEST
    if val_fraction is not None:
        rest = np.flatnonzero(targets == TRAIN)
        targets[rest[stratified(labels[rest], val_fraction, seed)]] = VAL
    return targets
