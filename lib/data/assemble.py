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
from lib.data.splits import Targets, split_train


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """What decides the result beside the source."""

    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    """Of a source without a test split."""
    max_duplicate_fraction: float = 0.01
    """Of the test rows that may have the same pixels as a train row."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 0.5]")
        if not 0 <= self.max_duplicate_fraction <= 1:
            raise ValueError(f"max_duplicate_fraction={self.max_duplicate_fraction} is no fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """A split of the source with the split of the data set that each row goes to."""

    rows: SplitRows
    targets: Targets


def assign(opened: Opened, config: IngestConfig) -> tuple[Assigned, ...]:
    """Decide where every row goes; raise DataError for a class that a split would lack."""
    there = {rows.split for rows in opened.splits}
    val_fraction = None if "val" in there else config.val_fraction
    test_fraction = None if "test" in there else config.test_fraction
    assigned = []
    for rows in opened.splits:
        is_train = rows.split == "train"
        num_cut = (val_fraction is not None) + (test_fraction is not None) if is_train else 0
        check_rows_per_class(
            rows.labels_name, rows.split, rows.labels, opened.class_names, 1 + num_cut
        )
        if is_train:
            targets = split_train(
                rows.labels,
                seed=config.seed,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
            )
        else:
            targets = np.full(rows.labels.size, SPLITS.index(rows.split), dtype=np.uint8)
        assigned.append(Assigned(rows=rows, targets=targets))
    return tuple(assigned)


def check_leaks(assigned: Sequence[Assigned], ids: RowIds, config: IngestConfig) -> None:
    """Raise DataError if too many test rows are in train or val too.

    Where test was cut from train, the cut may have separated duplicates of the source.
    """
    targets = np.concatenate([part.targets for part in assigned])
    is_test = targets == SPLITS.index("test")
    pairs = find_duplicates(ids, is_test)
    starts = np.cumsum([0] + [part.targets.size for part in assigned])

    def where(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return assigned[part].rows.reader.where(row - int(starts[part]))

    named = [(where(test), where(other)) for test, other in pairs]
    check_duplicates(named, int(is_test.sum()), config.max_duplicate_fraction)


def build_manifest(
    source: Source,
    opened: Opened,
    assigned: Sequence[Assigned],
    results: Sequence[ChunkResult],
    ids: RowIds,
    config: IngestConfig,
) -> Manifest:
    """Put together all that training and serving will know about the images."""
    labels: Labels = np.concatenate([part.rows.labels for part in assigned])
    targets = np.concatenate([part.targets for part in assigned])
    chosen = {split: np.flatnonzero(targets == index) for index, split in enumerate(SPLITS)}
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
