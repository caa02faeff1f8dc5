"""Parquet files of images and labels: how large sets come.

An image is raw pixels (fixed-size binary), or a PNG or JPEG file (binary, or the struct with
`bytes` that the Hugging Face hub writes); a label is a whole number or a class name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from lib.data.checks import Labels, check_class_names, check_labels, check_same_shape
from lib.data.manifest import Ignored
from lib.data.parquet_reader import IMAGE, ParquetReader, Piece, StagedReader, encoded, opened
from lib.data.pictures import DECODE_ERRORS, MODE_CHANNELS, SIXTEEN_BIT, decode
from lib.data.readers import RawReader, Reader, Shape, checked_range, merged_range
from lib.data.shards import chunk_rows
from lib.data.sources import (
    CLASSES_FILE,
    Listing,
    Opened,
    SplitRows,
    check_split_names,
    read_class_names,
    sha256_files,
    split_of,
)
from lib.data.splits import Keys
from lib.data.staging import Staging
from lib.errors import DataError
from lib.storage import Storage

LABEL = "label"
SHAPE_METADATA = b"rayline.shape"
_RAW_MODES = {1: "L", 3: "RGB"}
"""Channels of raw pixels → mode."""
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_RANGE_ROWS = 256
_MAX_NAMES_SHOWN = 20
_MAX_CHUNKS_PER_GROUP = 4
"""A task decodes a row group from its start: larger ones are unpacked once instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetSource:
    """DIR/*.parquet; the names of a file and its folders say its split, else all are of train."""

    name: str
    root: Storage
    files: Mapping[str, tuple[str, ...]]
    """Split → paths, in order."""
    digests: Mapping[str, str]
    ignored: tuple[Ignored, ...] = ()
    class_names: tuple[str, ...] | None
    """Of `classes.txt`; else the labels themselves say."""
    group: str | None = None
    """Column whose equal values keep rows in one split."""

    @classmethod
    def find(cls, root: Storage, listing: Listing, *, name: str) -> ParquetSource:
        """Tell the splits by the names, and hash the files."""
        paths = parquet_files(listing)
        places = {path: found for path in paths if (found := _split_of(path))}
        check_split_names(
            {path: word for path, (_, word) in places.items()},
            [path for path in paths if path not in places],
        )
        files: dict[str, list[str]] = {}
        for path in paths:
            files.setdefault(places[path][0] if places else "train", []).append(path)
        others = sorted(set(listing.files) - {*paths, CLASSES_FILE})
        uncommitted = [path for path in others if path.endswith(".parquet")]
        ignored = listing.ignoring(
            {
                "no Parquet file": [path for path in others if path not in uncommitted],
                "a name with `_`, which readers of Parquet leave out": uncommitted,
            }
        )
        return cls._hashed(root, files, name=name, ignored=ignored)

    @classmethod
    def find_file(cls, root: Storage, path: str, *, name: str) -> ParquetSource:
        """Hash one file, which is of train whatever it is called."""
        return cls._hashed(root, {"train": [path]}, name=name, ignored=())

    @classmethod
    def _hashed(
        cls,
        root: Storage,
        files: Mapping[str, Sequence[str]],
        *,
        name: str,
        ignored: tuple[Ignored, ...],
    ) -> ParquetSource:
        names = [path for paths in files.values() for path in paths]
        class_names = read_class_names(root)
        names += [CLASSES_FILE] if class_names else []
        return cls(
            name=name,
            root=root,
            files={split: tuple(files[split]) for split in sorted(files, reverse=True)},
            digests=dict(zip(names, sha256_files(root, names), strict=True)),
            class_names=class_names,
            ignored=ignored,
        )

    def open(self, staging: Staging) -> Opened:
        """Read heads and labels; unpack files whose row groups are too large for a task."""
        heads = {path: _head(self.root, path) for paths in self.files.values() for path in paths}
        kinds = {path: _kind(self.root, path, head) for path, head in heads.items()}
        check_same_shape({path: shape for path, (shape, _) in kinds.items()})
        shape, mode = next(iter(kinds.values()))
        grey_range = self._grey_range() if mode == SIXTEEN_BIT else None
        columns: Mapping[str, pa.ChunkedArray] = {path: self._label_column(path) for path in heads}
        class_names, classes_from = self.class_names, CLASSES_FILE
        if class_names is None:
            classes_from = next(iter(heads))
            class_names, columns = _classes(columns)
            check_class_names(self.name, class_names)
        labels = {
            path: _labels(path, column, class_names, classes_from)
            for path, column in columns.items()
        }
        readers = {
            split: self._reader(split, heads, shape, mode, grey_range, staging)
            for split in self.files
        }
        return Opened(
            class_names=class_names,
            shape=shape,
            grey_range=grey_range,
            splits=tuple(
                SplitRows(
                    split=split,
                    labels=np.concatenate([labels[path] for path in self.files[split]]),
                    reader=reader,
                    ends=reader.ends if isinstance(reader, ParquetReader) else (),
                    labels_name=f"{self.name}/{split}" if len(self.files) > 1 else self.name,
                    groups=self._groups(self.files[split]),
                )
                for split, reader in readers.items()
            ),
        )

    def _groups(self, paths: Sequence[str]) -> Keys | None:
        if self.group is None:
            return None
        keys = []
        for path in paths:
            with opened(self.root, path) as file:
                if self.group not in (names := file.schema_arrow.names):
                    raise DataError(f"{path}: no column {self.group!r}; it has {', '.join(names)}")
                column = file.read(columns=[self.group]).column(self.group)
            if column.null_count:
                row = pc.index(pc.is_null(column), True).as_py()
                raise DataError(f"{path}: row {row}: no {self.group}; give the row a group")
            keys += [xxhash.xxh3_64_intdigest(str(value).encode()) for value in column.to_pylist()]
        return np.array(keys, dtype=np.uint64)

    def _label_column(self, path: str) -> pa.ChunkedArray:
        with opened(self.root, path) as file:
            column = file.read(columns=[LABEL]).column(LABEL)
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise DataError(f"{path}: row {row}: no label; remove the row or give it one")
        return _plain(path, column)

    def _grey_range(self) -> tuple[int, int]:
        """Read all pictures once more, for the range of their values."""
        ranges = []
        with ThreadPoolExecutor() as pool:
            for path in (path for paths in self.files.values() for path in paths):
                row = 0
                with opened(self.root, path) as file:
                    for batch in file.iter_batches(batch_size=_RANGE_ROWS, columns=[IMAGE]):
                        bodies = encoded(batch.column(0)).to_pylist()
                        names = [f"{path}: row {row + index}" for index in range(len(bodies))]
                        ranges.append(merged_range(pool.map(checked_range, names, bodies)))
                        row += len(bodies)
        return merged_range(ranges)

    def _reader(
        self,
        split: str,
        heads: Mapping[str, pq.FileMetaData],
        shape: Shape,
        mode: str,
        grey_range: tuple[int, int] | None,
        staging: Staging,
    ) -> Reader:
        pieces = []
        for path in self.files[split]:
            row = 0
            for group in range(heads[path].num_row_groups):
                rows = heads[path].row_group(group).num_rows
                pieces.append(Piece(path=path, group=group, file_row=row, start=0, stop=rows))
                row += rows
        reader = ParquetReader(
            root=self.root, pieces=tuple(pieces), mode=mode, grey_range=grey_range
        )
        largest = max((piece.stop for piece in pieces), default=0)
        if largest <= _MAX_CHUNKS_PER_GROUP * chunk_rows(shape):
            return reader
        rows = sum(piece.stop for piece in pieces)
        path = staging.add(
            f"{split}-images", self._unpack(reader, shape), rows * int(np.prod(shape))
        )
        raw = RawReader(
            name=path, root=staging.storage, path=path, offset_bytes=0, start=0, stop=rows
        )
        return StagedReader(raw=raw, names=reader)

    def _unpack(self, reader: ParquetReader, shape: Shape) -> Iterator[memoryview]:
        rows = chunk_rows(shape)
        for path in dict.fromkeys(piece.path for piece in reader.pieces):
            row = 0
            with opened(self.root, path) as file:
                for batch in file.iter_batches(batch_size=rows, columns=[IMAGE]):
                    images = reader.decoded(batch.column(0), shape, path, row)
                    yield images.reshape(-1).data
                    row += batch.num_rows


def parquet_files(listing: Listing) -> list[str]:
    """Return the Parquet files; like others, leave out those below a name that begins with `_`."""
    return [
        path
        for path in listing.files
        if path.lower().endswith(".parquet") and not path.startswith("_") and "/_" not in path
    ]


def has_images(root: Storage, path: str) -> bool:
    """Whether a Parquet file has a column of images, which tables beside pictures have not."""
    with opened(root, path) as file:
        return IMAGE in file.schema_arrow.names


def _split_of(path: str) -> tuple[str, str] | None:
    """Return the split, and the word for it, that the names of a file and its folders agree on."""
    found = [split for name in path.split("/") if (split := split_of(name))]
    if len({split for split, _ in found}) > 1:
        raise DataError(
            f"{path}: of which split is it? Its names say {' and '.join(s for s, _ in found)}; "
            "rename the file or its folder"
        )
    return found[-1] if found else None


def _head(root: Storage, path: str) -> pq.FileMetaData:
    with opened(root, path) as file:
        there = file.schema_arrow.names
        if missing := [name for name in (IMAGE, LABEL) if name not in there]:
            raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(there)}")
        return file.metadata


def _kind(root: Storage, path: str, head: pq.FileMetaData) -> tuple[Shape, str]:
    """Return shape and mode, by the schema or by the first picture."""
    schema = head.schema.to_arrow_schema()
    kind = schema.field(IMAGE).type
    if not pa.types.is_fixed_size_binary(kind):
        return _first_picture(root, path)
    said = (schema.metadata or {}).get(SHAPE_METADATA)
    if said is not None:
        sides = [int(side) for side in said.split(b",") if side.isdigit()]
        if len(sides) == 3 and sides[2] in _RAW_MODES and math.prod(sides) == kind.byte_width:
            return (sides[0], sides[1], sides[2]), _RAW_MODES[sides[2]]
        raise DataError(
            f"{path}: {SHAPE_METADATA.decode()}={said.decode(errors='replace')} does not describe "
            f"its images of {kind.byte_width} bytes; write HEIGHT,WIDTH,1 or HEIGHT,WIDTH,3"
        )
    for channels, mode in _RAW_MODES.items():
        side = math.isqrt(kind.byte_width // channels)
        if side * side * channels == kind.byte_width:
            return (side, side, channels), mode
    raise DataError(
        f"{path}: row 0: {kind.byte_width} bytes are no square image; write the schema's metadata "
        f"{SHAPE_METADATA.decode()}=HEIGHT,WIDTH,CHANNELS"
    )


def _first_picture(root: Storage, path: str) -> tuple[Shape, str]:
    with opened(root, path) as file:
        first: Any = next(file.iter_batches(batch_size=1, columns=[IMAGE]), None)
    if first is None or not first.num_rows:
        raise DataError(f"{path}: no rows; remove the file")
    value = first.column(0)[0].as_py()
    body: Any = value.get("bytes") if isinstance(value, dict) else value
    try:
        pixels, mode = decode(body)
    except (*DECODE_ERRORS, TypeError) as error:
        raise DataError(
            f"{path}: row 0: unreadable picture: {error}; repair or remove it"
        ) from error
    return (pixels.shape[0], pixels.shape[1], MODE_CHANNELS[mode]), mode


def _plain(path: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return labels of any type as int64 or strings; raise DataError for what is neither."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    kind = column.type
    if pa.types.is_floating(kind):
        column = pc.cast(column, pa.float64())
        is_whole = pc.and_(pc.is_finite(column), pc.equal(pc.floor(column), column))
        row = pc.index(is_whole, False).as_py()
        if row >= 0:
            raise DataError(
                f"{path}: row {row}: label {column[row].as_py()} is no whole number; a label is a "
                "class, given by its number or its name"
            )
    if pa.types.is_primitive(kind) and not pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        target = pa.int64()
    elif any(is_text(kind) for is_text in _TEXT_TYPES):
        target = pa.string()
    else:
        raise DataError(
            f"{path}: labels of type {kind}; a label is one class a row, given by its number or "
            "its name"
        )
    try:
        return pc.cast(column, target)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: labels of type {kind} can't be read as {target}: {error}; write them anew"
        ) from error


def _classes(
    columns: Mapping[str, pa.ChunkedArray],
) -> tuple[tuple[str, ...], Mapping[str, pa.ChunkedArray]]:
    """Return the names of the classes, and the labels: strings where those are the names.

    Numbers are places of classes, 0, 1, 2 …, unless there are far fewer than the greatest says:
    then they are names such as ids.
    """
    first, *others = columns
    for path in others:
        if columns[path].type != columns[first].type:
            raise DataError(
                f"{first} has labels of type {columns[first].type}, {path} of "
                f"{columns[path].type}; write all as numbers or all as names, or put the names of "
                f"the classes into {CLASSES_FILE}, one a line"
            )
    values = pc.unique(pa.chunked_array([pc.unique(column) for column in columns.values()]))
    if not pa.types.is_integer(values.type):
        return tuple(sorted(values.to_pylist())), columns
    numbers = sorted(number for number in values.to_pylist() if number >= 0)
    num_places = numbers[-1] + 1 if numbers else 0
    if num_places <= 2 * len(numbers):
        return tuple(str(label) for label in range(num_places)), columns
    names = {path: pc.cast(column, pa.string()) for path, column in columns.items()}
    return tuple(str(number) for number in numbers), names


def _labels(
    path: str, column: pa.ChunkedArray, class_names: tuple[str, ...], classes_from: str
) -> Labels:
    if pa.types.is_integer(column.type):
        numbers: Any = column.to_numpy()
        check_labels(path, numbers, len(class_names), classes_from)
        labels: Labels = numbers.astype(np.int32)
        return labels
    found = pc.index_in(column, value_set=pa.array(class_names))
    if found.null_count:
        row = pc.index(pc.is_null(found), True).as_py()
        names = [*class_names[:_MAX_NAMES_SHOWN], *["…"][: len(class_names) - _MAX_NAMES_SHOWN]]
        raise DataError(
            f"{path}: row {row}: no class {column[row].as_py()!r} among {', '.join(names)}"
        )
    return found.to_numpy().astype(np.int32)
