"""Logged requests that were given a label: what a data set is extended with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.extend import LabelledImages
from lib.data.manifest import Manifest
from lib.storage import Storage

Joined = Callable[..., pa.Table]
"""`lib.watch.predictions.joined`."""
_SPAN_US = 6 * 3600 * 10**6
"""Of the log that is read at a time: all images of a week would not fit in memory."""


def labelled_requests(
    storage: Storage, model: str, parent: Manifest, joined: Joined, start_us: int, end_us: int
) -> LabelledImages:
    """Return the labelled requests to a model in start_us ≤ time < end_us that fit a data set."""
    spans = (
        joined(
            storage,
            model,
            start_us=start,
            end_us=min(start + _SPAN_US, end_us),
            columns=["shadow", "image"],
        )
        for start in range(start_us, end_us, _SPAN_US)
    )
    return labelled_images(spans, parent)


def labelled_images(tables: Iterable[pa.Table], parent: Manifest) -> LabelledImages:
    """Return the images and labels among logged requests; shadows' answers are no requests."""
    size, num_unfit = int(np.prod(parent.shape)), 0
    images, labels = [b""], [np.empty(0, dtype=np.int32)]
    for table in tables:
        is_known = pc.and_(pc.is_valid(table.column("label")), pc.is_valid(table.column("image")))
        rows = table.filter(pc.and_(pc.invert(table.column("shadow")), is_known))
        fitting = rows.filter(pc.equal(pc.binary_length(rows.column("image")), size))
        num_unfit += rows.num_rows - fitting.num_rows
        images += fitting.column("image").to_pylist()
        labels.append(fitting.column("label").to_numpy().astype(np.int32))
    return LabelledImages(
        images_NHWC=np.frombuffer(b"".join(images), dtype=np.uint8).reshape(-1, *parent.shape),
        labels_N=np.concatenate(labels),
        num_unfit=num_unfit,
    )
