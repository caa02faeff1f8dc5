"""True labels of answered requests: durable before they are acknowledged, settled when read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib.storage import Storage
from lib.watch.segments import Segments, by_span, read_segments

SCHEMA = pa.schema(
    [
        ("time_us", pa.int64()),
        ("request_id", pa.string()),
        ("index", pa.int32()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("caller", pa.string()),
    ]
)
"""What is kept of a label; `index` tells the images of one request apart, `caller` who gave it."""
SETTLED_SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("index", pa.int32()),
        ("label", pa.int32()),
        ("time_us", pa.int64()),
        ("is_contradicted", pa.bool_()),
    ]
)
MAX_FILE_ROWS = 1024
_KEY = ["request_id", "index"]


def labels_root(model: str) -> str:
    """Return the folder of a model's labels, relative to the storage root."""
    return f"labels/{model}"


class LabelLog:
    """Writes labels; those that come in while others are being written are the next write."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.time) -> None:
        self._storage = storage
        self._clock = clock
        self._segments: dict[str, Segments] = {}
        self._waiting: list[tuple[str, Mapping[str, Any], asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def add(self, model: str, label: Mapping[str, Any]) -> None:
        """Return when a label is on disk; `label` has SCHEMA's columns except for time_us.

        Raises StorageError if it could not be written.
        """
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        row = {**label, "time_us": int(self._clock() * 1e6)}
        self._waiting.append((model, row, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())
        await written

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            for model in {model for model, _, _ in batch}:
                mine = [(row, written) for name, row, written in batch if name == model]
                error: Exception | None = None
                try:
                    await asyncio.to_thread(self._store, model, [row for row, _ in mine])
                except Exception as caught:
                    error = caught
                for _, written in mine:
                    # Who asked may have gone away meanwhile.
                    if not written.done():
                        written.set_exception(error) if error else written.set_result(None)

    def _store(self, model: str, rows: list[Mapping[str, Any]]) -> None:
        segments = self._segments.get(model)
        if segments is None:
            segments = self._segments[model] = Segments(
                self._storage,
                labels_root(model),
                max_rows=MAX_FILE_ROWS,
                dictionary=["class_name", "caller"],
            )
        for part in by_span(pa.Table.from_pylist(rows, SCHEMA)):
            segments.append(part)


def read_labels(storage: Storage, model: str, *, start_us: int, end_us: int) -> pa.Table:
    """Return one label per image, of those given with start_us ≤ time < end_us, by SETTLED_SCHEMA.

    The last one counts; `is_contradicted` says that not all that were given are the same.
    """
    given = read_segments(storage, labels_root(model), SCHEMA, start_us=start_us, end_us=end_us)
    return settle(given)


def settle(given: pa.Table) -> pa.Table:
    """Return one label per image out of labels sorted by time."""
    if not given.num_rows:
        return SETTLED_SCHEMA.empty_table()
    # Threads would not keep the order that "last" needs.
    grouped = given.group_by(_KEY, use_threads=False).aggregate(
        [("label", "last"), ("label", "count_distinct"), ("time_us", "last")]
    )
    return pa.table(
        {
            **{name: grouped[name] for name in _KEY},
            "label": grouped["label_last"],
            "time_us": grouped["time_us_last"],
            "is_contradicted": pc.greater(grouped["label_count_distinct"], 1),
        },
        schema=SETTLED_SCHEMA,
    )
