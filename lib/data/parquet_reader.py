"""Reads ranges of rows of Parquet files, whatever their row groups are."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.pictures import DECODE_ERRORS, MODE_NAMES, decode
from lib.data.readers import Images, RawReader, Shape
from lib.errors import DataError
from lib.storage import Storage

IMAGE = "image"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some rows of one row group."""

    path: str
    group: int
    file_row: int
    """Row of the file at which the row group begins."""
    start: int
    """Counted from there."""
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetReader:
    """Rows of Parquet files, one file after the other."""

    root: Storage
    pieces: tuple[Piece, ...]
    mode: str
    """Of the data set: a key of `MODE_CHANNELS`."""
    grey_range: tuple[int, int] | None = None
    """Of a set of 16-bit pictures."""
    ends: tuple[int, ...] = field(init=False)
    """Rows at which a row group ends: each is decoded as a whole, whatever is read of it."""

    def __post_init__(self) -> None:
        """Add up the rows once: a file may have 100,000 row groups, and each chunk asks."""
        ends = itertools.accumulate(piece.stop - piece.start for piece in self.pieces)
        object.__setattr__(self, "ends", tuple(ends))

    def part(self, start: int, stop: int) -> ParquetReader:
        """Return a reader of rows `start` to `stop`."""
        chosen = []
        for index in range(bisect.bisect_right(self.ends, start), len(self.pieces)):
            piece = self.pieces[index]
            row = self.ends[index] - (piece.stop - piece.start)
            if row >= stop:
                break
            first, last = max(start - row, 0), min(stop - row, piece.stop - piece.start)
            if first < last:
                chosen.append(replace(piece, start=piece.start + first, stop=piece.start + last))
        return replace(self, pieces=tuple(chosen))

    def read(self, shape: Shape) -> Images:
        """Decode the row groups, and keep the rows that are asked for."""
        parts = []
        for path, pieces in itertools.groupby(self.pieces, key=lambda piece: piece.path):
            with opened(self.root, path) as file:
                for piece in pieces:
                    parts += self._read(file, piece, shape)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def where(self, row: int) -> str:
        """Return the file and row."""
        index = bisect.bisect_right(self.ends, row)
        piece = self.pieces[index]
        return f"{piece.path} row {piece.file_row + piece.stop - (self.ends[index] - row)}"

    def _read(self, file: pq.ParquetFile, piece: Piece, shape: Shape) -> list[Images]:
        column = file.read_row_group(piece.group, columns=[IMAGE], use_threads=False).column(0)
        row = piece.file_row + piece.start
        rows = column.slice(piece.start, piece.stop - piece.start)
        parts = []
        for chunk in rows.chunks:
            parts.append(self.decoded(chunk, shape, piece.path, row))
            row += len(chunk)
        return parts

    def decoded(self, column: pa.Array, shape: Shape, path: str, row: int) -> Images:
        """Return a column as (N, H, W, C); raw pixels without a copy. `row` is the first one's."""
        if column.null_count:
            missing = row + column.is_null().index(True).as_py()
            raise DataError(f"{path}: row {missing}: no image; remove the row")
        if pa.types.is_fixed_size_binary(column.type):
            width = column.type.byte_width
            if width != np.prod(shape):
                raise DataError(f"{path}: row {row}: {width} bytes are no image of {shape}")
            pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8)
            start = column.offset * width
            return pixels[start : start + len(column) * width].reshape(-1, *shape)
        images = np.empty((len(column), *shape), dtype=np.uint8)
        for index, body in enumerate(encoded(column)):
            where = f"{path}: row {row + index}"
            try:
                pixels, mode = decode(body.as_py(), self.grey_range)
            except (*DECODE_ERRORS, TypeError) as error:
                raise DataError(
                    f"{where}: unreadable picture: {error}; repair or remove it"
                ) from error
            if (*pixels.shape[:2], mode) != (*shape[:2], self.mode):
                raise DataError(
                    f"mixed image sizes or colour modes: {where} is {pixels.shape[0]}×"
                    f"{pixels.shape[1]} {MODE_NAMES[mode]}, the first row {shape[0]}×{shape[1]} "
                    f"{MODE_NAMES[self.mode]}"
                )
            images[index] = pixels
        return images


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedReader:
    """Rows unpacked to a file of raw pixels; messages name where they come from."""

    raw: RawReader
    names: ParquetReader

    def part(self, start: int, stop: int) -> StagedReader:
        """Return a reader of rows `start` to `stop`."""
        return StagedReader(raw=self.raw.part(start, stop), names=self.names.part(start, stop))

    def read(self, shape: Shape) -> Images:
        """Read the unpacked range."""
        return self.raw.read(shape)

    def where(self, row: int) -> str:
        """Return the file and row."""
        return self.names.where(row)


@contextlib.contextmanager
def opened(root: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; raise DataError naming it if it is damaged or can't be read."""
    try:
        with root.filesystem.open_input_file(root.path(path)) as file:
            yield pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: no Parquet file, or damaged: {error}; fetch it again") from error


def encoded(column: pa.Array) -> pa.Array:
    """Return the PNG and JPEG files of a column."""
    return column.field("bytes") if pa.types.is_struct(column.type) else column
