"""From the rows of a source to a manifest: who goes where, what is counted, what it is called."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.data.checks import (
    Labels,
    RowIds,
    check_duplicates,
    check_rows_per_class,
    find_duplicates,
)
from lib.data.manifest import FORMAT_VERSION, SPLITS, Manifest, Preprocess
from lib.data.readers import Shape
from lib.data.shards import ChunkResult, PixelSums, split_digest
from lib.data.sources import Opened, Source, SplitRows
from lib.data.splits import TEST, Targets, id_keys, split_train
from lib.errors import ConfigError, DataError

RowOrder = npt.NDArray[np.int64]
"""Row numbers, counted through the splits of a source, in the order in which rows are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """What decides the result beside the source."""

    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    """Of a source without a test split."""
    max_duplicate_fraction: float = 0.01
    """Of the rows of test that may have the same pixels as a row of train or val, and of those of
    val that may have them as one of train."""
    group: str | None = None
    """Column of a Parquet source: rows with the same value of it go to one split."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ConfigError(f"{name}={getattr(self, name)} must be in (0, 0.5]")
        if not 0 <= self.max_duplicate_fraction <= 1:
            raise ConfigError(
                f"max_duplicate_fraction={self.max_duplicate_fraction} is no fraction"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """A split of the source with the split of the data set that each row goes to."""

    rows: SplitRows
    targets: Targets


def check_classes(opened: Opened, config: IngestConfig) -> None:
    """Raise DataError for a class with fewer rows than splits that need one of it."""
    for rows in opened.splits:
        check_rows_per_class(
            rows.labels_name,
            rows.split,
            rows.labels,
            opened.class_names,
            1 + sum(fraction is not None for fraction in _cut(opened, config, rows.split)),
        )


def _cut(opened: Opened, config: IngestConfig, split: str) -> tuple[float | None, float | None]:
    """Return the fractions for val and test that are cut from a split of the source."""
    there = {rows.split for rows in opened.splits}
    return (
        config.val_fraction if split == "train" and "val" not in there else None,
        config.test_fraction if split == "train" and "test" not in there else None,
    )


def assign(opened: Opened, ids: RowIds, config: IngestConfig) -> tuple[Assigned, ...]:
    """Decide where every row goes; raise DataError for a class that a split would lack.

    Args:
        opened: The source.
        ids: Of all its rows.
        config: Says what is cut from train.
    """
    assigned, start = [], 0
    for rows in opened.splits:
        own_ids = ids[start : start + rows.labels.size]
        start += rows.labels.size
        val_fraction, test_fraction = _cut(opened, config, rows.split)
        if rows.split == "train":
            keys = id_keys(own_ids) if rows.groups is None else rows.groups
            targets = split_train(
                rows.labels,
                keys,
                seed=config.seed,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
            )
            _check_targets(rows, targets, opened.class_names, config)
        else:
            targets = np.full(rows.labels.size, SPLITS.index(rows.split), dtype=np.uint8)
        assigned.append(Assigned(rows=rows, targets=targets))
    return tuple(assigned)


def _check_targets(
    rows: SplitRows, targets: Targets, class_names: Sequence[str], config: IngestConfig
) -> None:
    """Raise DataError for a class of which whole units could not be shared out."""
    together = f"one group of {config.group!r}" if config.group else "the same pixels"
    for target in np.unique(targets):
        counts = np.bincount(rows.labels[targets == target], minlength=len(class_names))
        if missing := np.flatnonzero(counts == 0).tolist():
            raise DataError(
                f"{rows.labels_name}: class {class_names[missing[0]]!r} would have no row in "
                f"{SPLITS[target]}: rows with {together} stay on one side, and too few are "
                "independent of each other; add others of this class, or give the source a split "
                "of its own"
            )


def check_leaks(assigned: Sequence[Assigned], ids: RowIds, config: IngestConfig) -> None:
    """Raise DataError if too many rows of test or val are in another split too.

    Where a split was cut from train by row ids, none is; one that the source has may be.
    """
    targets = np.concatenate([part.targets for part in assigned])
    starts = np.cumsum([0] + [part.targets.size for part in assigned])

    def where(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return assigned[part].rows.reader.where(row - int(starts[part]))

    # A row in both test and val counts as one of test.
    for split, rows in (
        ("test", np.arange(targets.size)),
        ("val", np.flatnonzero(targets != TEST)),
    ):
        held_out = targets[rows] == SPLITS.index(split)
        named = [
            (where(int(rows[row])), where(int(rows[other])))
            for row, other in find_duplicates(np.take(ids, rows, axis=0), held_out)
        ]
        check_duplicates(split, named, int(held_out.sum()), config.max_duplicate_fraction)
    if config.group is not None:
        groups = np.concatenate([part.rows.groups for part in assigned])
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        apart = np.flatnonzero(targets != targets[first][inverse])
        if apart.size:
            row, other = int(apart[0]), int(first[inverse[apart[0]]])
            raise DataError(
                f"{np.unique(groups[apart]).size} groups of {config.group!r} are in several "
                f"splits of the source: {where(row)} in {SPLITS[targets[row]]} is of the same "
                f"group as {where(other)} in {SPLITS[targets[other]]}; put each group into one "
                "split, or put all rows into train and let the ingest cut the others from it"
            )


def build_manifest(
    source: Source,
    opened: Opened,
    assigned: Sequence[Assigned],
    results: Sequence[ChunkResult],
    ids: RowIds,
    order: RowOrder,
    config: IngestConfig,
) -> Manifest:
    """Put together all that training and serving will know about the images."""
    labels: Labels = np.concatenate([part.rows.labels for part in assigned])
    targets = np.concatenate([part.targets for part in assigned])
    chosen = {split: order[targets[order] == index] for index, split in enumerate(SPLITS)}
    split_digests = {
        split: split_digest(np.take(ids, rows, axis=0), labels[rows])
        for split, rows in chosen.items()
    }
    sums = functools.reduce(operator.add, (result.sums for result in results))
    mean, square = sums.moments()
    return Manifest(
        digest=content_digest(
            opened.shape, opened.class_names, split_digests, FORMAT_VERSION, opened.grey_range
        ),
        source=source.name,
        source_digests=dict(source.digests),
        height=opened.shape[0],
        width=opened.shape[1],
        channels=opened.shape[2],
        class_names=opened.class_names,
        counts={
            split: tuple(np.bincount(labels[rows], minlength=len(opened.class_names)).tolist())
            for split, rows in chosen.items()
        },
        split_digests=split_digests,
        pixel_mean=mean,
        pixel_std=deviation(mean, square),
        preprocess=Preprocess(
            mode="L" if opened.shape[2] == 1 else "RGB",
            fill=_border_colour(sums),
            grey_range=opened.grey_range,
        ),
        shards=tuple(shard for result in results for shard in result.shards),
        seed=config.seed,
        group=config.group,
        format_version=FORMAT_VERSION,
        ignored=source.ignored,
    )


def content_digest(
    shape: Shape,
    class_names: Sequence[str],
    split_digests: Mapping[str, str],
    format_version: int,
    grey_range: tuple[int, int] | None,
) -> str:
    """Return what a data set with this content is called, however it came about."""
    content: dict[str, Any] = {
        "shape": shape,
        "class_names": list(class_names),
        "splits": dict(split_digests),
        "format_version": format_version,
    }
    if grey_range is not None:  # The same pixels, made of pictures that are scaled otherwise.
        content["grey_range"] = grey_range
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def deviation(mean_C: Sequence[float], square_C: Sequence[float]) -> tuple[float, ...]:
    """Return the standard deviation per channel from mean and mean square."""
    return tuple(
        math.sqrt(max(square - mean**2, 0.0)) for mean, square in zip(mean_C, square_C, strict=True)
    )


def _border_colour(sums: PixelSums) -> tuple[int, ...]:
    """Return the mean colour of the outermost pixels, what a picture is padded with."""
    border = np.ones(sums.values_HWC.shape[:2], dtype=np.bool_)
    border[1:-1, 1:-1] = False
    border_C = sums.values_HWC[border].sum(axis=0) / max(1, sums.rows * int(border.sum()))
    return tuple(int(value) for value in np.rint(border_C))
