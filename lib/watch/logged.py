"""What a rollout reads of the prediction log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import StorageError
from lib.serving.bundle import Card, bundle_path
from lib.storage import Storage
from lib.watch import predictions
from lib.watch.evidence import COLUMNS
from lib.watch.replay import Logged

MAX_IMAGES = 2000
WINDOWS_S = (30, 180, 900, 3600, 6 * 3600, 24 * 3600, 72 * 3600)
"""How far back it is looked, as far as it takes to find so many."""
LABELS_SINCE_S = 24 * 3600
"""Where labels came in this time, they are to be expected."""
_IMAGE_COLUMNS = ("version", "shadow", "predicted", "image")


def read_answers(
    storage: Storage, model: str, bundles: Mapping[int, str], *, start_us: int, end_us: int
) -> pa.Table:
    """Return what `lib.watch.evidence.gather` takes; raise StorageError if it can't be read."""
    return _joined(storage, model, bundles, start_us, end_us, COLUMNS)


def read_logged(storage: Storage, model: str, card: Card, *, now_us: int) -> Logged:
    """Return the newest images that a version answered, with what it said."""
    rows: list[pa.Table] = []
    bundles = {card.version: bundle_path(model, card.version, card.run_id)}
    for start_us, end_us in _windows(now_us):
        found = _joined(storage, model, bundles, start_us, end_us, _IMAGE_COLUMNS)
        found = found.filter(pc.equal(found["version"], card.version))
        found = found.filter(pc.invert(found["shadow"]))
        found = found.filter(pc.greater_equal(found["predicted"], 0))
        size = pc.fill_null(pc.binary_length(found["image"]), 0)
        rows.append(found.filter(pc.equal(size, card.image_bytes)))
        if sum(table.num_rows for table in rows) >= MAX_IMAGES:
            break
    # The newest window came first.
    table = pa.concat_tables(rows[::-1])
    table = table.slice(max(0, table.num_rows - MAX_IMAGES))
    pixels = b"".join(table["image"].to_pylist())
    labels = _read(
        lambda: predictions.read_labels(
            storage, model, start_us=now_us - LABELS_SINCE_S * 10**6, end_us=now_us
        )
    )
    return Logged(
        images_NHWC=np.frombuffer(pixels, np.uint8).reshape(-1, *card.shape),
        champion_N=table["predicted"].to_numpy().astype(np.int64),
        label_N=pc.fill_null(table["label"], -1).to_numpy().astype(np.int64),
        num_recent_labels=labels.num_rows,
    )


def _joined(
    storage: Storage,
    model: str,
    bundles: Mapping[int, str],
    start_us: int,
    end_us: int,
    columns: Sequence[str],
) -> pa.Table:
    return _read(
        lambda: predictions.joined(
            storage, model, start_us=start_us, end_us=end_us, columns=columns, bundles=bundles
        )
    )


def _read(read: Callable[[], pa.Table]) -> pa.Table:
    try:
        return read()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"the prediction log can't be read: {error}") from error


def _windows(now_us: int) -> Iterator[tuple[int, int]]:
    end_us = now_us
    for seconds in WINDOWS_S:
        start_us = now_us - seconds * 10**6
        yield start_us, end_us
        end_us = start_us
