"""The prediction log: what was answered, by which version, and what the true label was.

Gateways write it (`lib.watch.recorder`) and delete what is old; monitor, rollout and retrain read
it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib.cli import progress
from lib.errors import ConfigError
from lib.serving.bundle import bundle_path
from lib.storage import Storage
from lib.watch.labels import labels_root, read_labels
from lib.watch.segments import (
    MAX_US,
    erase_segments,
    expire_segments,
    read_segments,
    scan_segments,
)

__all__ = ["SCHEMA", "Retention", "expire", "joined", "predictions_root", "read", "read_labels"]

_log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("time_us", pa.int64()),
        ("request_id", pa.string()),
        ("index", pa.int32()),
        ("version", pa.int32()),
        ("shadow", pa.bool_()),
        ("caller", pa.string()),
        ("latency_ms", pa.float32()),
        ("predicted", pa.int32()),
        ("probabilities", pa.list_(pa.float32())),
        ("status", pa.int32()),
        ("image", pa.binary()),
        ("features", pa.list_(pa.float32())),
        ("run_id", pa.string()),
        ("trace_id", pa.string()),
    ]
)
"""A row for each image and each version that was asked about it.

time_us: When it was answered, UTC, microseconds since 1970.
index: Which image of its request, from 0.
shadow: Whether this is the answer of a shadow, which no caller got.
caller: Name of the API key.
latency_ms: Of the whole request in the gateway; of the call for a shadow.
predicted: Number of the class; -1 if the version failed, and then `probabilities` is null.
status: HTTP status.
image: uint8, height × width × channels as the model takes it, for a share of the requests.
features: `lib.watch.features.features`; of a share under load, never of a shadow, whose image the
    row of the answer has.
run_id: MLflow run of the version, which its number alone does not tell if a registered model was
    deleted and made again; null in files of older gateways.
trace_id: Of the W3C trace context, 32 hexadecimal digits; null where the caller sent none and the
    gateway sends no spans, of a shadow, and in files of older gateways.
"""
_ROOT = "predictions"
_IDENTITY = ["version", "run_id"]
_named: set[str] = set()
"""What was said about rows in this process."""
_SETTLE_S = 600.0
"""After which no writer has a file of that time open: it is of five minutes, and flushes late."""
_EXPIRE_EVERY_S = 86_400.0
_EARLY_US = 3600 * 10**6
"""Clocks of gateways differ, and who chooses the request id may give the label at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Erased:
    """What was erased from the log, or would be."""

    rows: Mapping[str, int]
    """Model → rows of its log."""
    labels: Mapping[str, int]
    images: tuple[bytes, ...] = field(repr=False)
    """Those that the requests had."""


def predictions_root(model: str) -> str:
    """Return the folder of a model's log, relative to the storage root."""
    return f"{_ROOT}/{model}"


def read(
    storage: Storage,
    model: str,
    *,
    start_us: int,
    end_us: int,
    columns: Sequence[str] | None = None,
    bundles: Mapping[int, str] | None = None,
) -> pa.Table:
    """Return the rows with start_us ≤ time_us < end_us, sorted by time_us.

    Args:
        storage: Where.
        model: Name of the registered model.
        start_us: UTC, microseconds since 1970.
        end_us: The same.
        columns: Name those that you need: images are most of the log.
        bundles: Version → its bundle. Rows of other versions that had one of these numbers, in a
            model that was deleted and made again, are left out. Rows without a run count by their
            number.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    loaded = [*wanted, *(name for name in _IDENTITY if bundles and name not in wanted)]
    root = predictions_root(model)
    rows = read_segments(storage, root, SCHEMA, start_us=start_us, end_us=end_us, columns=loaded)
    return _of_bundles(rows, model, bundles or {}).select(wanted)


def joined(
    storage: Storage,
    model: str,
    *,
    start_us: int,
    end_us: int,
    columns: Sequence[str] | None = None,
    bundles: Mapping[int, str] | None = None,
) -> pa.Table:
    """Return `read` with a column `label`, null where none was given, however late it came.

    A request id that several answered requests carry is ambiguous, so its labels are left out.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    keys = ["request_id", "index", "shadow", "predicted", *_IDENTITY]
    rows = read(
        storage,
        model,
        start_us=start_us,
        end_us=end_us,
        columns=list(dict.fromkeys([*wanted, *keys])),
    )
    labels = read_labels(storage, model, start_us=start_us - _EARLY_US, end_us=MAX_US)
    image = _image(rows)
    label = labels["label"].take(pc.index_in(image, value_set=_image(labels)))
    ambiguous = _more_than_once(image.filter(_is_labelled_answer(rows, label)))
    label = pc.if_else(pc.is_in(image, value_set=ambiguous), pa.scalar(None, pa.int32()), label)
    rows = _of_bundles(rows.append_column("label", label), model, bundles or {})
    return rows.select([*wanted, "label"])


def num_answers(
    storage: Storage,
    model: str,
    request_id: str,
    index: int,
    *,
    start_us: int,
    end_us: int,
    budget_s: float = math.inf,
) -> int | None:
    """Return how many answers carry an image's id: 1 can be labelled, more are ambiguous.

    Only files of this time are searched, the newest first and no further than the first one with
    the id; None if `budget_s` was over before.
    """
    end_s = time.monotonic() + budget_s
    columns = ["request_id", "index", "shadow", "predicted"]
    for rows in scan_segments(
        storage, predictions_root(model), start_us=start_us, end_us=end_us, columns=columns
    ):
        mine = rows.filter(pc.equal(rows["request_id"], request_id))
        found = count_answers(mine, index)
        if found or time.monotonic() > end_s:
            return found or None
    return 0


def count_answers(rows: pa.Table, index: int) -> int:
    """Return how many rows of one request id are answers that a caller got for an image."""
    is_answer = pc.and_(pc.invert(rows["shadow"]), pc.greater_equal(rows["predicted"], 0))
    found = pc.sum(pc.and_(is_answer, pc.equal(rows["index"], index))).as_py()
    return int(found or 0)


def expire(storage: Storage, model: str, keep_days: int, *, now: datetime | None = None) -> int:
    """Delete what is older than so many whole days, labels too; return the number of days.

    Raises ConfigError for less than one day.
    """
    if keep_days < 1:
        raise ConfigError(f"keep_days={keep_days}: the log must be kept for at least one day")
    before = ((now or datetime.now(UTC)) - timedelta(days=keep_days)).date()
    expired = expire_segments(storage, predictions_root(model), before=before)
    expire_segments(storage, labels_root(model), before=before)
    return expired


def erase(
    storage: Storage,
    request_ids: Collection[str],
    is_image: Callable[[bytes], bool],
    *,
    remove: bool,
    now_s: float | None = None,
) -> Erased:
    """Erase requests from the logs and labels of all models.

    Args:
        storage: Where.
        request_ids: The requests.
        is_image: Whether a request that asked about this image goes too.
        remove: Whether they go, or are only counted.
        now_s: UTC, in seconds since 1970.

    Raises: DataError with exit code `HELD` for a request or a label of the last minutes.
    """
    settled_us = int(((now_s or time.time()) - _SETTLE_S) * 1e6)
    folders = [*storage.folders(_ROOT), *storage.folders(labels_root("").rstrip("/"))]
    models = sorted({folder.rpartition("/")[2] for folder in folders})
    ids = set(request_ids)

    def of_image(table: pa.Table) -> pa.ChunkedArray:
        known = [image is not None and is_image(image) for image in table["image"].to_pylist()]
        return pc.or_(of_request(table), pa.chunked_array([known], pa.bool_()))

    def of_request(table: pa.Table) -> pa.ChunkedArray:
        return pc.is_in(table["request_id"], value_set=pa.array(sorted(ids), pa.string()))

    def look(root: str, is_erased: Any, columns: Sequence[str], *, remove: bool) -> pa.Table:
        return erase_segments(
            storage, root, is_erased, columns=columns, settled_us=settled_us, remove=remove
        )

    images: list[bytes] = []
    for model in models:
        found = look(predictions_root(model), of_image, ["request_id", "image"], remove=False)
        # Answers of shadows, and labels, have the id of the request and no image.
        ids |= set(found["request_id"].to_pylist())
        images += [image for image in found["image"].to_pylist() if image is not None]
    rows: dict[str, int] = {}
    labels: dict[str, int] = {}
    # Looked for everywhere before anything goes. The labels go first: the log knows their ids.
    for is_last in (False, True) if remove else (False,):
        for root, counted in ((labels_root, labels), (predictions_root, rows)):
            for model in models:
                found = look(root(model), of_request, ["request_id"], remove=is_last)
                counted[model] = found.num_rows
    return Erased(
        rows={model: number for model, number in rows.items() if number},
        labels={model: number for model, number in labels.items() if number},
        images=tuple(images),
    )


class Retention:
    """Deletes once a day what is too old of every model that there is a log of, served or not.

    Several gateways may do so at the same time.
    """

    def __init__(
        self, storage: Storage, keep_days: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self._keep_days = keep_days
        self._clock = clock
        self._due_s = -math.inf

    def look(self) -> None:
        """Delete what is too old if it is time. Never raises: what fails is tried the next day."""
        if self._clock() < self._due_s:
            return
        self._due_s = self._clock() + _EXPIRE_EVERY_S
        try:
            models = [path.rpartition("/")[2] for path in self._storage.folders(_ROOT)]
        except Exception:
            _log.exception("what is too old in the prediction log could not be looked for")
            return
        for model in models:
            try:
                expire(self._storage, model, self._keep_days)
            except Exception:
                _log.exception("what is too old in the log of %s could not be deleted", model)


def _of_bundles(rows: pa.Table, model: str, bundles: Mapping[int, str]) -> pa.Table:
    """Leave out rows of other versions that had the numbers of these; name both kinds once."""
    if not bundles:
        return rows
    counted = rows.group_by(_IDENTITY).aggregate([([], "count_all")])
    for found in counted.to_pylist():
        version, run_id, num = found["version"], found["run_id"], found["count_all"]
        if version not in bundles:
            continue
        if run_id is None:
            _name_once(
                f"rows of version {version} of {model} have no run, as older gateways wrote them: "
                "they count for the version that has this number now",
                num,
            )
        elif bundle_path(model, version, run_id) != bundles[version]:
            is_other = pc.and_(pc.equal(rows["version"], version), pc.equal(rows["run_id"], run_id))
            rows = rows.filter(pc.invert(pc.fill_null(is_other, False)))
            _name_once(
                f"rows are of another version {version} of {model}, of run {run_id}, and are left "
                "out",
                num,
            )
    return rows


def _name_once(text: str, num_rows: int) -> None:
    if text not in _named:
        _named.add(text)
        progress("log", f"{num_rows:,} {text}")


def _image(rows: pa.Table) -> pa.Array:
    """Return what names an image: its request's id and its place there."""
    index = pc.cast(rows["index"], pa.string())
    return pc.binary_join_element_wise(rows["request_id"], index, "/").combine_chunks()


def _is_labelled_answer(rows: pa.Table, label: pa.ChunkedArray) -> pa.ChunkedArray:
    is_answer = pc.and_(pc.invert(rows["shadow"]), pc.greater_equal(rows["predicted"], 0))
    return pc.and_(is_answer, pc.is_valid(label))


def _more_than_once(values: pa.Array) -> pa.Array:
    counted = pc.value_counts(values)
    return counted.field("values").filter(pc.greater(counted.field("counts"), 1))
