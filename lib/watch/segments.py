"""Few Parquet files from many small writes.

A writer's newest file grows by being replaced as a whole, so all rows given to it are on disk, and
readers never see a row twice or half. Once a file is full, or its five minutes are over, the next
one is begun. Nothing has to be merged afterwards, and names tell readers which files to open:
`ROOT/date=YYYY-MM-DD/HHMM-WRITER-NUMBER.parquet` holds rows of the five minutes from HHMM, UTC.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import HELD, DataError, MissingError
from lib.storage import Storage

SPAN_US = 300 * 10**6
"""Time that a file covers, in microseconds; a whole day is a multiple of it."""
READERS = 8
MAX_US = 2**62
"""Later than anything."""
_DAY = "date="


class Segments:
    """One writer's files below a folder; not for two threads at once.

    Args:
        storage: Where.
        root: The folder, relative to the storage root.
        max_rows: A file with so many is not added to any more.
        dictionary: Columns whose values repeat.
    """

    def __init__(
        self, storage: Storage, root: str, *, max_rows: int, dictionary: Sequence[str]
    ) -> None:
        self._storage = storage
        self._root = root
        self._max_rows = max_rows
        self._dictionary = list(dictionary)
        self._writer = uuid.uuid4().hex[:12]
        self._number = 0
        self._span: int | None = None
        self._open: pa.Table | None = None

    def append(self, rows: pa.Table) -> None:
        """Write rows of one span (see `by_span`); they are on disk when this returns.

        Raises StorageError if they could not be written; the same rows can then be given again.
        """
        span = rows["time_us"][0].as_py() // SPAN_US
        grown, number = rows, self._number
        if self._open is not None and span == self._span:
            grown = pa.concat_tables([self._open, rows]).combine_chunks()
        elif self._open is not None:
            number += 1
        sink = pa.BufferOutputStream()
        pq.write_table(
            grown,
            sink,
            compression="zstd",
            use_dictionary=self._dictionary,
            write_statistics=["time_us"],
        )
        start = datetime.fromtimestamp(span * SPAN_US // 10**6, UTC)
        name = f"{start:%H%M}-{self._writer}-{number:06d}.parquet"
        self._storage.write(f"{self._root}/{_DAY}{start:%Y-%m-%d}/{name}", sink.getvalue())
        is_full = grown.num_rows >= self._max_rows
        self._number, self._span = number + is_full, span
        self._open = None if is_full else grown


def by_span(rows: pa.Table) -> list[pa.Table]:
    """Split rows by the file that they belong to."""
    spans = rows["time_us"].to_numpy() // SPAN_US
    if not len(spans) or spans.min() == spans.max():
        return [rows] if len(spans) else []
    return [rows.take(np.flatnonzero(spans == span)) for span in np.unique(spans)]


def read_segments(
    storage: Storage,
    root: str,
    schema: pa.Schema,
    *,
    start_us: int,
    end_us: int,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Return the rows of all writers with start_us ≤ time_us < end_us, sorted by time_us."""
    wanted = list(schema.names if columns is None else columns)
    loaded = list(dict.fromkeys(["time_us", *wanted]))
    paths = list(_paths(storage, root, start_us, end_us))

    def load(path: str) -> pa.Table | None:
        try:
            rows = _read(storage, path, loaded)
        except MissingError:
            # Its time of being kept ended since the folder was listed.
            return None
        for name in set(loaded) - set(rows.column_names):
            # Written before the schema had this column.
            rows = rows.append_column(name, pa.nulls(rows.num_rows, schema.field(name).type))
        rows = rows.select(loaded)
        times = rows["time_us"]
        inside = pc.and_(pc.greater_equal(times, start_us), pc.less(times, end_us))
        return rows.filter(inside)

    with ThreadPoolExecutor(READERS) as readers:
        tables = [rows for rows in readers.map(load, paths) if rows is not None]
    empty = pa.schema([schema.field(name) for name in loaded]).empty_table()
    rows = pa.concat_tables([empty, *tables])
    times = rows["time_us"].to_numpy()
    if (times[1:] < times[:-1]).any():
        # `take` needs the columns in one piece; images are large, so only where it must be.
        rows = rows.take(np.argsort(times, kind="stable"))
    return rows.select(wanted)


def scan_segments(
    storage: Storage, root: str, *, start_us: int, end_us: int, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield the rows of each file that may hold some of this time, the newest file first.

    A file at a time, and a day's files are listed when it is reached, so that a long log can be
    searched in little memory, and left at any time.
    """
    for path in _paths(storage, root, start_us, end_us, newest_first=True):
        with contextlib.suppress(MissingError):  # Its time ended since the folder was listed.
            yield _read(storage, path, columns)


def erase_segments(
    storage: Storage,
    root: str,
    is_erased: Callable[[pa.Table], pa.ChunkedArray],
    *,
    columns: Sequence[str],
    settled_us: int,
    remove: bool,
) -> pa.Table:
    """Erase rows of all writers from their files, and return those rows.

    Args:
        storage: Where.
        root: The folder of the files.
        is_erased: Takes a table of `columns`, and returns which of its rows go.
        columns: Read of every file.
        settled_us: Writers may still replace files with later rows: a row that goes from one
            raises DataError, before any file has changed.
        remove: Whether the rows go, or are only returned.
    """
    chosen = []
    for path in _paths(storage, root, 0, MAX_US):
        rows = _read(storage, path, ["time_us", *columns])
        mask = is_erased(rows)
        if not pc.any(mask).as_py():
            continue
        if pc.max(rows["time_us"]).as_py() >= settled_us:
            raise DataError(
                f"{path} is of the last minutes, and its writer would write the rows again; run "
                "the same command again ten minutes after the request",
                exit_code=HELD,
            )
        chosen.append((path, rows, mask))
    for path, _, mask in chosen if remove else ():
        rest = _read(storage, path).filter(pc.invert(mask))
        if rest.num_rows:
            sink = pa.BufferOutputStream()
            pq.write_table(rest, sink, compression="zstd", write_statistics=["time_us"])
            storage.write(path, sink.getvalue())
        else:
            storage.delete(path)
    found = [rows.select(columns).filter(mask) for _, rows, mask in chosen]
    return pa.concat_tables(found) if found else pa.table({name: [] for name in columns})


def expire_segments(storage: Storage, root: str, *, before: date) -> int:
    """Delete all days before this one; return how many."""
    old = [folder for folder in storage.folders(root) if _day(folder) < before.isoformat()]
    for folder in old:
        storage.delete_folder(folder)
    return len(old)


def _read(storage: Storage, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    def read() -> pa.Table:
        with storage.filesystem.open_input_file(storage.path(path)) as stream:
            return pq.ParquetFile(stream).read(columns, use_threads=False)

    return storage.attempt("read", path, read)


def _paths(
    storage: Storage, root: str, start_us: int, end_us: int, *, newest_first: bool = False
) -> Iterator[str]:
    """Yield the files that may hold rows of a time, in the order of their spans."""
    step = -1 if newest_first else 1
    for folder in storage.folders(root)[::step]:
        day_us = _day_us(_day(folder))
        if not start_us - 86_400 * 10**6 < day_us < end_us:
            continue
        for path in storage.list(folder)[::step]:
            name = path.rpartition("/")[2]
            span_us = day_us + (int(name[:2]) * 60 + int(name[2:4])) * 60 * 10**6
            if start_us - SPAN_US < span_us < end_us:
                yield path


def _day(folder: str) -> str:
    return folder.rpartition(_DAY)[2]


def _day_us(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 10**6
