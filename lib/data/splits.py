"""Which rows go to train, val and test: by what an image is, the same for the same seed.

Rows that belong together, such as equal images, are a unit: all of them go to one split.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lib.data.checks import Labels, RowIds

TRAIN, VAL, TEST = 0, 1, 2
"""Index into `manifest.SPLITS`."""

Targets = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]
"""Per row, as good as random; rows of one unit have the same."""


def id_keys(ids: RowIds) -> Keys:
    """Return the first half of each row id: equal images have equal keys.

    Two of 10⁸ other images have the same key once in 4,000 sets, and then share a split.
    """
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


def row_hash(num_rows: int, seed: int) -> Keys:
    """Return a hash per row number."""
    return seeded(np.arange(num_rows, dtype=np.uint64), seed)


def seeded(values: npt.NDArray[np.uint64], seed: int) -> Keys:
    """Return other keys for each seed (splitmix64), equal where the values are.

    An own hash: a generator of a library may give other numbers in its next version, and the
    same data would then be split otherwise.
    """
    start = np.array([(seed * 0xD1342543DE82EF95 + 1) % 2**64], dtype=np.uint64)
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + start
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def stratified(labels: Labels, fraction: float, keys: Keys) -> npt.NDArray[np.bool_]:
    """Choose `fraction` of the rows of every class, at least one and not all.

    Units are chosen whole, in the order of their keys, so a class gets as many rows as units come
    near its number: exactly that where each row is a unit. Rare classes choose first. What they
    chose counts for the classes that share a unit with them.
    """
    counts = np.bincount(labels)
    wanted = np.minimum(np.maximum(np.rint(counts * fraction), 1), np.maximum(counts - 1, 0))
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    units = np.cumsum(np.r_[False, in_order[1:] != in_order[:-1]])
    chosen = np.zeros(labels.size, dtype=np.bool_)
    by_class = np.argsort(
        labels[order].astype(np.uint16) if counts.size <= 2**16 else labels[order], kind="stable"
    )
    of_class = np.split(units[by_class], np.cumsum(counts)[:-1])
    for label in np.argsort(counts, kind="stable"):
        units_of = of_class[label]
        starts = np.flatnonzero(np.r_[units_of[:1] == units_of[:1], units_of[1:] != units_of[:-1]])
        there, sizes = units_of[starts], np.diff(np.r_[starts, units_of.size])
        free = ~chosen[there]
        missing = wanted[label] - sizes[~free].sum()
        # A unit far larger than what is missing would take its place from many others.
        fits = np.flatnonzero(free & (sizes <= 2 * missing))
        num = np.count_nonzero(np.cumsum(sizes[fits]) - sizes[fits] / 2 <= missing)
        fits = fits[: min(num, np.count_nonzero(free) - 1)]
        if not fits.size and free.all() and there.size > 1 and wanted[label]:
            fits = np.array([np.argmin(sizes)])
        chosen[there[fits]] = True
    result = np.empty(labels.size, dtype=np.bool_)
    result[order] = chosen[units]
    return result


def split_train(
    labels: Labels,
    keys: Keys,
    *,
    seed: int,
    val_fraction: float | None,
    test_fraction: float | None,
) -> Targets:
    """Assign each row of a source's train split; None takes nothing out for that split."""
    keys = seeded(keys, seed)
    targets = np.full(labels.size, TRAIN, dtype=np.uint8)
    if test_fraction is not None:
        targets[stratified(labels, test_fraction, keys)] = TEST
    if val_fraction is not None:
        rest = np.flatnonzero(targets == TRAIN)
        targets[rest[stratified(labels[rest], val_fraction, keys[rest])]] = VAL
    return targets
